// The settings of a chat: fields of the form, kept as texts. An empty field leaves the choice to the server.

const NUMBERS = ["temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_tokens", "max_think_tokens", "seed"];
const NAMES = ["system", "stop", "think", ...NUMBERS];

export const DEFAULTS = { max_tokens: "256" };

/** What the fields of the form hold. */
export function readSettings(form) {
  const fields = NAMES.map((name) => [name, form.elements[name].value.trim()]);
  return Object.fromEntries(fields.filter(([, value]) => value !== ""));
}

export function fillSettings(form, settings) {
  for (const name of NAMES) form.elements[name].value = settings[name] ?? "";
}

/** The fields of a request; `stop` has one text per line, where \n is a line feed. */
export function asRequest(settings) {
  const body = {};
  for (const name of NUMBERS) if (settings[name]) body[name] = Number(settings[name]);
  if (settings.think) body.think = settings.think;
  const stop = settings.stop?.split("\n").filter(Boolean);
  if (stop?.length) body.stop = stop.map((text) => text.replaceAll("\\n", "\n"));
  return body;
}
