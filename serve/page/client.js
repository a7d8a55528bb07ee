// Requests to the server. A failure is a Problem, whose message is a sentence for the user.

class Problem extends Error {
  constructor(message, gone = false) {
    super(message);
    this.gone = gone; // the server does not answer
  }
}

const GONE = "The server does not answer. It may have been stopped, or the connection is interrupted.";
const BROKEN = "The connection to the server ended before the text. It may have been stopped.";

// The response to a request, a GET if there is no body. Raises Problem, and AbortError if the signal aborts it.
async function request(path, body, signal) {
  const post = { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  const response = await fetch(path, { signal, ...(body && post) }).catch((error) => {
    throw error.name === "AbortError" ? error : new Problem(GONE, true);
  });
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const reason = answer?.error?.message ?? `status ${response.status}`;
  const sentence = reason.replace(/^[a-z](?=[a-z]* [a-z])/, (first) => first.toUpperCase()); // no name of a field
  throw new Problem(sentence + (sentence.endsWith(".") ? "" : "."));
}

async function requestJson(path, body, signal) {
  const response = await request(path, body, signal);
  return response.json().catch((error) => {
    throw error.name === "AbortError" ? error : new Problem(BROKEN, true);
  });
}

// The server-sent events of a stream, as objects. Raises like `request`.
async function* events(path, body, signal) {
  const reader = (await request(path, { ...body, stream: true }, signal)).body
    .pipeThrough(new TextDecoderStream())
    .getReader();
  for (let held = ""; ; ) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : new Problem(BROKEN, true);
    });
    if (done) throw new Problem(BROKEN, true);
    const lines = (held + value).split("\n\n");
    held = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") return;
      const event = JSON.parse(line.slice("data: ".length));
      if (event.error) throw new Problem(`The server stopped the generation: ${event.error.message}.`);
      yield event;
    }
  }
}

// The bytes of a text in base64.
function bytes(base64) {
  return Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
}
