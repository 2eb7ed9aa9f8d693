"use strict";
/** Links that save what the page holds. */
{
  const { el } = Vitrine.dom;
  const urls = [];

  /**
   * @param {Blob} blob
   * @param {string} name of the file
   * @param {string} text of the link
   * @returns {HTMLElement}
   */
  function file(blob, name, text) {
    const url = URL.createObjectURL(blob);
    urls.push(url);
    return el("a", { class: "button", href: url, download: name }, text);
  }

  /**
   * @param {string} answer the API's, as it came
   * @param {string} name of the image's file
   * @returns {HTMLElement} the link that saves it
   */
  function json(answer, name) {
    const blob = new Blob([answer], { type: "application/json" });
    return file(blob, `${name.replace(/\.\w+$/, "")}.account.json`, "Save the answer (JSON)");
  }

  /** Let go of what earlier links would have saved. */
  function forget() {
    for (const url of urls.splice(0)) URL.revokeObjectURL(url);
  }

  Vitrine.save = { file, json, forget };
}
