"""Programs of others ask the server: lm-evaluation-harness, OpenAI's Agents SDK, pydantic-ai, litellm.

lm-eval is run as `lm_eval --model local-completions --tasks NAME --model_args base_url=…` runs it. None is in
the requirements; a test is skipped where its program is missing:

    pip install "lm-eval[api]>=0.4.13" "openai-agents>=0.24" "pydantic-ai-slim[openai]>=2.68" "litellm>=1.83"
"""

import asyncio
import csv
import json
import random

import pytest
from helpers import SENTENCES
from test_api import call_ids

from model.chat import IM_END, encode

pytestmark = pytest.mark.extra
CALL = '{"name": "weather", "arguments": {"city": "上海"}}'


@pytest.fixture
def weather(say, tokenizer):
    """The model calls weather(city), and then answers."""
    say("天气？", [*call_ids(tokenizer, CALL), IM_END], [*encode(tokenizer, "上海晴。"), IM_END])


# ------------------------------------------------------------------------------------------- lm-evaluation-harness

QUESTIONS = 60
TASK = """
task: jiezi_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: ["{{{{A}}}}", "{{{{B}}}}", "{{{{C}}}}", "{{{{D}}}}"]
doc_to_target: "{{{{['A', 'B', 'C', 'D'].index(answer)}}}}"
target_delimiter: ""
metric_list: [{{metric: acc_bytes}}, {{metric: acc}}]
"""


def test_lm_eval_counts_what_eval_counts(live, models, tmp_path, run_here, monkeypatch):
    """The same questions by eval.py --choice, by lm-eval in transformers, and by lm-eval asking the server."""
    lm_eval = pytest.importorskip("lm_eval")
    tasks = pytest.importorskip("lm_eval.tasks")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rng = random.Random(0)
    rows = []
    for _ in range(QUESTIONS):
        question, *options = (rng.choice(SENTENCES)[:-3].strip() + "。" for _ in range(5))
        options = [f"{option[:5]}{letter}{rng.randint(0, 99)}" for option, letter in zip(options, "甲乙丙丁")]
        rows.append({"question": question} | dict(zip("ABCD", options)) | {"answer": rng.choice("ABCD")})
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with open(tmp_path / "test.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    result = run_here("eval.py", "--model", models[1], "--choice", tmp_path / "test.csv", "--json", "--device", "cpu")
    ours = json.loads(result.out.splitlines()[-1])["accuracy"]
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "task.yaml").write_text(TASK.format(file=tmp_path / "test.jsonl"))
    manager = tasks.TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False)
    both = "add_bos_token=True,max_length=384"
    server = f"base_url={live.url}/v1/completions,model=pretrain,tokenizer={models[1]},tokenizer_backend=huggingface"
    accuracy = {}
    for kind, arguments in (
        ("hf", f"pretrained={models[1]},dtype=float32,{both}"),
        ("local-completions", f"{server},{both}"),
    ):
        options = dict(tasks=["jiezi_choice"], task_manager=manager, batch_size=8, device="cpu", bootstrap_iters=0)
        found = lm_eval.simple_evaluate(model=kind, model_args=arguments, **options)
        accuracy[kind] = found["results"]["jiezi_choice"]["acc_bytes,none"]
    assert abs(accuracy["hf"] - ours) <= 1 / QUESTIONS + 1e-9, (accuracy, ours)
    assert abs(accuracy["local-completions"] - ours) <= 1 / QUESTIONS + 1e-9, (accuracy, ours)


# -------------------------------------------------------------------------------------------- agents by /v1/responses


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_openais_agents_sdk_runs_a_tool(live, weather, stream):
    agents = pytest.importorskip("agents")
    from openai import AsyncOpenAI

    asked = []

    @agents.function_tool(strict_mode=False)
    def weather(city: str) -> str:
        """天气"""
        asked.append(city)
        return "晴"

    async def run() -> str:
        client = AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none")
        agents.set_tracing_disabled(True)
        model = agents.OpenAIResponsesModel("sft", client)
        agent = agents.Agent("a", instructions="简短", model=model, tools=[weather])
        if not stream:
            return (await agents.Runner.run(agent, "天气？")).final_output
        running = agents.Runner.run_streamed(agent, "天气？")
        async for _ in running.stream_events():
            pass
        return running.final_output

    assert asyncio.run(run()) == "上海晴。"
    assert asked == ["上海"]


@pytest.mark.parametrize("kind", ["responses", "chat"])
def test_pydantic_ai_runs_a_tool(live, weather, kind):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
    from pydantic_ai.providers.openai import OpenAIProvider

    provider = OpenAIProvider(base_url=f"{live.url}/v1", api_key="none")
    model = (OpenAIResponsesModel if kind == "responses" else OpenAIChatModel)("sft", provider=provider)
    agent, asked = pydantic_ai.Agent(model, instructions="简短"), []

    @agent.tool_plain
    def weather(city: str) -> str:
        """天气"""
        asked.append(city)
        return "晴"

    assert agent.run_sync("天气？").output == "上海晴。"
    assert asked == ["上海"]


def test_litellm_knows_a_full_context(live):
    litellm = pytest.importorskip("litellm")
    common = dict(model="openai/sft", api_base=f"{live.url}/v1", api_key="none")
    with pytest.raises(litellm.ContextWindowExceededError):
        litellm.completion(messages=[{"role": "user", "content": "花" * 5000}], **common)
    answer = litellm.completion(messages=[{"role": "user", "content": "你好"}], max_tokens=4, **common)
    assert answer.usage.completion_tokens == 4
    response = litellm.responses(input="你好", max_output_tokens=4, **common)
    assert response.usage.output_tokens == 4
