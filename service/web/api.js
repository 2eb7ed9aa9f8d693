"use strict";
/** Calls of the service: keys, retries when it is busy, and errors as sentences. */
{
  const RETRIES = 3;
  let key = null; // kept in this variable alone

  /** What the service, or the way to it, answered in the place of an answer. `message` is a sentence. */
  class CallError extends Error {
    /**
     * @param {string} message
     * @param {string} code of the envelope
     * @param {?string} requestId
     * @param {boolean} passing whether the same request may succeed later
     */
    constructor(message, code, requestId = null, passing = false) {
      super(message);
      this.passing = passing;
      this.code = code;
      this.requestId = requestId;
    }
  }

  /** @param {string} value the key that calls bring along from now on */
  function setKey(value) {
    key = value;
  }

  /** @returns {?string} the key that calls bring along */
  function currentKey() {
    return key;
  }

  /**
   * @param {string} path relative to the page
   * @param {{signal?: AbortSignal}} [options]
   * @returns {Promise<Object>} the answer. Rejects with `CallError`, or `AbortError`
   */
  async function get(path, options = {}) {
    return (await call(path, {}, options)).answer;
  }

  /**
   * @param {string} path
   * @param {Blob} image
   * @param {string} name of the image's file
   * @param {Object} request what is asked
   * @param {{signal?: AbortSignal, onWait?: function(string)}} [options] onWait: told why it takes longer
   * @returns {Promise<{answer: Object, text: string, ms: number}>} the answer, as it came, and how long it took
   */
  function post(path, image, name, request, options = {}) {
    const body = new FormData();
    body.append("image", image, name);
    body.append("request", JSON.stringify(request));
    return call(path, { method: "POST", body }, options);
  }

  async function call(path, init, { signal, onWait }) {
    for (let attempt = 0; ; attempt += 1) {
      const start = performance.now();
      const response = await send(path, init, signal);
      const text = await response.text().catch(gone);
      if (response.ok) return { answer: JSON.parse(text), text, ms: performance.now() - start };
      if (response.status !== 429 || attempt === RETRIES) throw refusal(response, text, attempt);
      const seconds = Number(response.headers.get("Retry-After") ?? 1) || 0; // of a date: 0; the service sends none
      onWait?.(`The service is busy; trying again in ${seconds} s.`);
      await pause(1000 * seconds, signal);
    }
  }

  async function send(path, init, signal) {
    const headers = key === null ? {} : { Authorization: `Bearer ${key}` };
    return fetch(path, { ...init, headers, signal, credentials: "same-origin", cache: "no-store" }).catch(gone);
  }

  /** What fetch says of a broken network depends on the browser. */
  function gone(error) {
    if (error.name === "AbortError") throw error;
    const message = "The service cannot be reached. Check that it is running, and check the network.";
    throw new CallError(message, "network", null, true);
  }

  function refusal(response, text, attempts) {
    const { code, message, request_id: id } = envelope(text);
    const said = message && message[0].toUpperCase() + message.slice(1) + (/[.!?]$/.test(message) ? "" : ".");
    const more = {
      401: "The service requires a key.",
      429: `The service is still busy after ${attempts} retries; try again later.`,
      503: "The service is not ready; try again later.",
    }[response.status];
    const passing = response.status === 429 || response.status >= 500;
    const status = `The service answered with status ${response.status}.`;
    return new CallError(more ?? said ?? status, code ?? "unknown", id, passing);
  }

  /** The error of the API's envelope; what a proxy answers in its place is none. */
  function envelope(text) {
    try {
      return JSON.parse(text).error ?? {};
    } catch {
      return {};
    }
  }

  function pause(ms, signal) {
    return new Promise((resolve, reject) => {
      const timer = setTimeout(resolve, ms);
      signal?.addEventListener("abort", () => {
        clearTimeout(timer);
        reject(signal.reason);
      });
    });
  }

  Vitrine.api = { get, post, setKey, key: currentKey, CallError };
}
