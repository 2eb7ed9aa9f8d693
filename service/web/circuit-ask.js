"use strict";
/** The way to the circuit page: a window of its own, which asks the one that opened it for the question. */
{
  const questions = new WeakMap(); // by window; it asks again when it is loaded again

  window.addEventListener("message", ({ source, origin, data }) => {
    if (origin === location.origin && data === "question" && questions.has(source)) {
      source.postMessage(questions.get(source), origin);
    }
  });

  /**
   * @param {{picture: Blob, name: string, request: Object, key: ?string}} question
   * @returns {boolean} whether the browser opened the window
   */
  function open(question) {
    const opened = window.open("circuit", "_blank");
    if (opened) questions.set(opened, question);
    return opened !== null;
  }

  Vitrine.circuitAsk = { open };
}
