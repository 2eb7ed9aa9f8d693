"use strict";
/** The account of one explained logit: the question, and the source account or the direct ledger, a tab each. */
{
  const { el, newId, plain, percent } = Vitrine.dom;
  const ACCOUNTS = { sources: "Source account", ledger: "Direct ledger" };

  /**
   * @param {Object} explanation the API's Explanation
   * @param {Object} options of `Vitrine.accountTable`, and
   * @param {?number} options.probability of the target, if it is known
   * @param {string} options.edited which edit is in force, after other words
   * @param {function(string)} options.onAccount told which account is shown from now on
   * @returns {HTMLElement[]}
   */
  function draw(explanation, options) {
    if (kind(explanation, options.state) === null) {
      return [title(explanation, options), ...Vitrine.ledger.draw(explanation, options)];
    }
    return [title(explanation, options), ...tabbed(explanation, options)];
  }

  /** Which account is shown; null: there is the ledger alone. @returns {?string} */
  function kind(explanation, state) {
    return explanation?.sources ? state.kind : null;
  }

  function title(explanation, { probability, edited }) {
    const { target, contrast, logit } = explanation;
    const rather = contrast === null ? "" : [" rather than ", el("em", {}, contrast)];
    const what = contrast === null ? "Logit " : "Logit difference ";
    const share = contrast === null && probability !== null ? ` · probability ${percent(probability)}` : "";
    return el(
      "div",
      { class: "question" },
      el("h2", { id: "why" }, "Why ", el("em", {}, target), rather, "?"),
      el("p", { class: "result" }, what, el("strong", {}, plain(logit)), share, edited),
    );
  }

  function tabbed(explanation, options) {
    const { state } = options;
    const kinds = Object.keys(ACCOUNTS);
    const panel = el("div", { id: newId(), role: "tabpanel", class: "account-panel" });
    const tabs = kinds.map((name) => {
      const press = { type: "button", role: "tab", id: newId(), "data-key": `tab ${name}`, "aria-controls": panel.id };
      return el("button", { ...press, onclick: () => choose(name) }, ACCOUNTS[name]);
    });
    const list = el("div", { class: "tabs", role: "tablist", "aria-label": "Which account", onkeydown: step }, tabs);
    fill();

    function fill() {
      tabs.forEach((tab, place) => {
        const selected = kinds[place] === state.kind;
        tab.setAttribute("aria-selected", String(selected));
        tab.setAttribute("tabindex", selected ? "0" : "-1");
        if (selected) panel.setAttribute("aria-labelledby", tab.id);
      });
      panel.replaceChildren(...Vitrine[state.kind].draw(explanation, options));
    }

    function choose(name) {
      if (name === state.kind) return;
      state.kind = name;
      options.onAccount(name);
      fill();
    }

    function step(event) {
      const to = { ArrowLeft: -1, ArrowRight: 1, Home: -kinds.length, End: kinds.length }[event.key];
      if (to === undefined) return;
      event.preventDefault();
      const place = Math.min(kinds.length - 1, Math.max(0, kinds.indexOf(state.kind) + to));
      choose(kinds[place]);
      tabs[place].focus();
    }

    return [list, panel];
  }

  Vitrine.account = { draw, kind };
}
