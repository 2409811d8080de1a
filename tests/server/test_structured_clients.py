"""Libraries whose structured output or forced tools go through the server: each gets a valid object from a model that
writes nonsense. They are installed apart:

    pip install instructor "pydantic-ai-slim[openai]" langchain-openai llama-index-llms-openai-like outlines litellm \
        llm smolagents openai-agents guidance
"""

import asyncio
import json
from typing import Literal

import pytest
from conftest import Live
from helpers import TOKENIZER, sharp_model
from pydantic import BaseModel, Field

from model.chat import EOS, IM_END
from model.checkpoint import save_model
from model.LMConfig import PRESETS, LMConfig

pytestmark = pytest.mark.extra


class Pet(BaseModel):
    """A pet."""

    name: str = Field(max_length=12)
    kind: Literal["猫", "狗"]
    legs: int = Field(ge=0, le=4)


ASK = "描述一只宠物"


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """A server whose model has room for the prompts of agents."""
    folder = tmp_path_factory.mktemp("clients") / "sft"
    model = sharp_model(LMConfig(**PRESETS["tiny"] | {"max_position_embeddings": 8192}))
    model.stop_token_ids = [EOS, IM_END]
    save_model(folder, model, TOKENIZER)
    live = Live([folder])
    yield f"{live.url}/v1"
    live.close()


@pytest.fixture
def client(url):
    from openai import OpenAI

    with OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


@pytest.mark.parametrize("mode", ["JSON_SCHEMA", "TOOLS"])
def test_instructor(client, mode):
    instructor = pytest.importorskip("instructor")
    create = instructor.from_openai(client, mode=instructor.Mode[mode]).chat.completions.create
    messages = [{"role": "user", "content": ASK}]
    assert isinstance(create(model="sft", messages=messages, response_model=Pet, max_retries=0, max_tokens=300), Pet)


@pytest.mark.parametrize("way", ["ToolOutput", "NativeOutput"])
def test_pydantic_ai(url, way):
    pydantic_ai = pytest.importorskip("pydantic_ai")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    model = OpenAIChatModel("sft", provider=OpenAIProvider(base_url=url, api_key="none"))
    agent = pydantic_ai.Agent(model, output_type=getattr(pydantic_ai, way)(Pet))
    assert isinstance(agent.run_sync(ASK).output, Pet)


@pytest.mark.parametrize("method", ["json_schema", "function_calling"])
def test_langchain(url, method):
    langchain_openai = pytest.importorskip("langchain_openai")
    chat = langchain_openai.ChatOpenAI(model="sft", base_url=url, api_key="none", max_retries=0, max_tokens=300)
    assert isinstance(chat.with_structured_output(Pet, method=method).invoke(ASK), Pet)


def test_llama_index(url):
    module = pytest.importorskip("llama_index.llms.openai_like")
    llm = module.OpenAILike(
        model="sft", api_base=url, api_key="none", is_chat_model=True, is_function_calling_model=True, max_tokens=300
    )
    assert isinstance(llm.as_structured_llm(Pet).complete(ASK).raw, Pet)


def test_outlines(client):
    outlines = pytest.importorskip("outlines")
    Pet.model_validate_json(outlines.from_openai(client, "sft")(ASK, Pet, max_tokens=300))
    vllm = outlines.from_vllm(client, "sft")
    assert vllm(ASK, Literal["是", "否"], max_tokens=20) in ("是", "否")
    Pet.model_validate_json(vllm(ASK, Pet, max_tokens=300))


def test_guidance(url):
    guidance = pytest.importorskip("guidance")
    model = guidance.models.OpenAI("sft", base_url=url, api_key="none")
    with guidance.user():
        model += ASK
    with guidance.assistant():
        model += guidance.json(name="pet", schema=Pet)
    Pet.model_validate_json(model["pet"])


def test_litellm(url):
    litellm = pytest.importorskip("litellm")
    reply = litellm.completion(
        model="openai/sft",
        api_base=url,
        api_key="none",
        messages=[{"role": "user", "content": ASK}],
        response_format=Pet,
        max_tokens=300,
    )
    Pet.model_validate_json(reply.choices[0].message.content)


def test_llm(url, tmp_path, monkeypatch):
    monkeypatch.setenv("LLM_USER_PATH", str(tmp_path))
    llm = pytest.importorskip("llm")
    entry = f"- model_id: jiezi\n  model_name: sft\n  api_base: {url}\n  supports_schema: true\n"
    (tmp_path / "extra-openai-models.yaml").write_text(entry)
    Pet.model_validate_json(llm.get_model("jiezi").prompt(ASK, schema=Pet, stream=False, key="none").text())


def test_smolagents(url):
    smolagents = pytest.importorskip("smolagents")

    @smolagents.tool
    def save(kind: str) -> str:
        """Saves a pet.

        Args:
            kind: what it is
        """
        return kind

    model = smolagents.OpenAIModel("sft", api_base=url, api_key="none", max_tokens=200)
    asked = [smolagents.ChatMessage(role="user", content=[{"type": "text", "text": ASK}])]
    message = model.generate(asked, tools_to_call_from=[save])
    assert message.tool_calls[0].function.name == "save"
    arguments = message.tool_calls[0].function.arguments
    assert isinstance((json.loads(arguments) if isinstance(arguments, str) else arguments)["kind"], str)


def test_openai_agents(url):
    agents = pytest.importorskip("agents")
    from openai import AsyncOpenAI

    agents.set_tracing_disabled(True)

    async def run():
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
            model = agents.OpenAIChatCompletionsModel(model="sft", openai_client=client)
            agent = agents.Agent(name="pets", model=model, output_type=Pet)
            return await agents.Runner.run(agent, ASK)

    assert isinstance(asyncio.run(run()).final_output, Pet)
