// The server's public HTTP interface, and every way in which a call of it can fail. Knows nothing of the page.

/** A failed call, said so that it can be shown. */
export class ApiError extends Error {
  /**
   * @param {string} message
   * @param {{status?: number, param?: string | null}} details `status` is 0 where no answer came; `param` is
   *     the field of the request that the server objects to.
   */
  constructor(message, { status = 0, param = null } = {}) {
    super(message);
    this.status = status;
    this.param = param;
  }
}

export class Api {
  #key;

  /** @param {() => string} key asked before every call; "" where there is none */
  constructor(key) {
    this.#key = key;
  }

  async models() {
    return (await this.#json("v1/models")).data;
  }

  async classify(body, signal) {
    return (await this.#json("v1/classify", body, signal)).data[0];
  }

  async tokenize(body, signal) {
    return this.#json("tokenize", body, signal);
  }

  /** Yields the chunks of one streamed completion. Throws an ApiError, or an AbortError once aborted. */
  async *complete(body, signal) {
    const streamed = { ...body, stream: true, stream_options: { include_usage: true } };
    const response = await this.#request("v1/completions", streamed, signal);
    try {
      for await (const data of serverSentEvents(response.body)) {
        if (data === "[DONE]") return;
        const chunk = parsed(data);
        if (chunk.error) throw new ApiError(chunk.error.message, { param: chunk.error.param });
        yield chunk;
      }
    } catch (error) {
      throw error instanceof ApiError || signal.aborted ? error : new ApiError(LOST);
    }
    throw new ApiError(LOST); // the stream ended, but did not say that it was complete
  }

  async #json(path, body, signal) {
    const response = await this.#request(path, body, signal);
    try {
      return await response.json();
    } catch (error) {
      throw signal?.aborted ? error : new ApiError("The server's answer cannot be read.");
    }
  }

  /** GET without a body, else POST. */
  async #request(path, body, signal) {
    const headers = body ? { "Content-Type": "application/json" } : {};
    const key = this.#key();
    if (/[^\x21-\x7e]/.test(key)) {
      throw new ApiError("The API key holds a character that no key can have. Enter it again.", { status: 401 });
    }
    if (key) headers.Authorization = `Bearer ${key}`;
    let response;
    try {
      const method = body ? "POST" : "GET";
      response = await fetch(path, { method, headers, body: body && JSON.stringify(body), signal });
    } catch (error) {
      throw signal?.aborted ? error : new ApiError("The server cannot be reached. Is it still running?");
    }
    if (!response.ok) throw await failure(response);
    return response;
  }
}

const LOST = "The connection was lost before the completion was finished.";

/** What an answer with an error status means. */
async function failure(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch {
    // Not from our server but from something between: the status has to say it all.
  }
  const said = typeof error.message === "string" ? error.message : response.statusText;
  const parts = [said || "The server refused the request", `(${response.status}).`];
  if (response.status === 401) parts.push("Enter the key under “API key”.");
  const seconds = retryAfter(response.headers.get("Retry-After"));
  if (seconds > 0) parts.push(`Try again in ${seconds} s.`);
  return new ApiError(parts.join(" "), { status: response.status, param: error.param });
}

/** Seconds, given as a number or as a date; NaN without either. */
function retryAfter(value) {
  return Math.ceil(/^\d+$/.test(value ?? "") ? Number(value) : (Date.parse(value) - Date.now()) / 1000);
}

function parsed(data) {
  try {
    return JSON.parse(data);
  } catch {
    throw new ApiError("The server sent something that cannot be read.");
  }
}

/** Yields the data of each event of a text/event-stream. */
async function* serverSentEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  let data = [];
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const lines = (rest + value).split(/\r?\n/);
      rest = lines.pop();
      for (const line of lines) {
        if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
        if (line === "" && data.length) {
          yield data.join("\n");
          data = [];
        }
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // also when the consumer stops early: the server then stops generating
  }
}
