"use strict";
/** What an answer says beside what was asked for: labels that are cut, the same or unknown to the model. */
{
  const { el } = Vitrine.dom;

  /** @param {Object[]} warnings the API's @returns {?HTMLElement} null where there are none */
  function draw(warnings) {
    if (!warnings.length) return null;
    const line = ({ code, message }) => el("li", { "data-code": code }, message);
    return el("ul", { class: "warnings", "aria-label": "Warnings" }, warnings.map(line));
  }

  /** For a listener. @returns {string} */
  function spoken(warnings) {
    return warnings.map(({ message }) => ` Warning: ${message}`).join("");
  }

  Vitrine.warnings = { draw, spoken };
}
