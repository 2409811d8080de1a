// One model's answer, as it comes: from the request to the fields of an answer (conversations.js).

import { stream } from "./api.js";
import { asRequest } from "./settings.js";
import { readPieces } from "./tokens.js";

/**
 * Generates `answer` to `text`, or continues it where it has content. `before`: the turns before it, of which the oldest
 * are left out as long as the context is too small. `changed` is called whenever something has come.
 */
export async function generate({ model, before, text, answer, settings, probabilities, signal, changed }) {
  const path = model.is_chat ? "v1/chat/completions" : "v1/completions";
  const earlier = before.filter((turn) => turn.answers[model.id]?.content);
  const [began, tokens] = [performance.now(), answer.tokens ?? 0];
  delete answer.finish;
  delete answer.error;
  for (let again = true; again; ) {
    again = false;
    const body = request({ model, earlier, text, answer, settings, probabilities });
    try {
      for await (const chunk of stream(path, body, signal)) {
        const choice = chunk.choices?.[0];
        if (choice) add(answer, choice, began);
        if (chunk.usage) {
          answer.tokens = tokens + chunk.usage.completion_tokens;
          answer.context = chunk.usage.total_tokens;
        }
        changed();
      }
    } catch (error) {
      again = error.code === "context_length_exceeded" && earlier.length > 0;
      if (again) {
        earlier.shift(); // as eval.py does
        answer.forgot = (answer.forgot ?? 0) + 1;
      } else if (signal.aborted) answer.finish = "stopped";
      else answer.error = error.message;
    }
  }
  answer.seconds = (answer.seconds ?? 0) + (performance.now() - began) / 1000;
  changed();
}

function request({ model, earlier, text, answer, settings, probabilities }) {
  const body = { model: model.id, stream: true, stream_options: { include_usage: true }, ...asRequest(settings) };
  if (!model.is_chat) {
    answer.given = text;
    return { ...body, prompt: text + answer.content, ...(probabilities && { logprobs: 5 }) };
  }
  body.messages = messages(settings.system, earlier, model.id, text);
  if (probabilities) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (!answer.content) return body;
  body.messages.push({ role: "assistant", content: answer.content, ...(answer.reasoning && { reasoning_content: answer.reasoning }) });
  return { ...body, continue_final_message: true, add_generation_prompt: false };
}

function messages(system, earlier, id, text) {
  const past = earlier.flatMap((turn) => [
    { role: "user", content: turn.text },
    { role: "assistant", content: turn.answers[id].content },
  ]);
  return [...(system ? [{ role: "system", content: system }] : []), ...past, { role: "user", content: text }];
}

function add(answer, choice, began) {
  const delta = choice.delta ?? choice;
  const content = delta.content ?? delta.text ?? "";
  if (content || delta.reasoning_content) answer.first ??= (performance.now() - began) / 1000;
  answer.content += content;
  answer.reasoning += delta.reasoning_content ?? "";
  answer.runs.push(...(delta.tool_runs ?? []));
  for (const part of delta.tool_calls ?? []) {
    const call = (answer.calls[part.index ?? answer.calls.length] ??= { name: "", arguments: "" });
    call.name += part.function?.name ?? "";
    call.arguments += part.function?.arguments ?? "";
  }
  if (choice.logprobs) (answer.pieces ??= []).push(...readPieces(choice.logprobs));
  if (choice.finish_reason) answer.finish = choice.finish_reason;
}
