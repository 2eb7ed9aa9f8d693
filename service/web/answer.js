"use strict";
/** An answer in its sections: predictions, account, trust, time. For the page and for saved accounts. */
{
  const { el, replace, percent } = Vitrine.dom;

  /**
   * @param {Object<string, HTMLElement>} sections predictions, account, trust, timings
   * @param {Object} photo of `Vitrine.photo`
   * @param {Object} options
   * @param {?Object} options.preprocessing the manifest's
   * @param {function(number, number)} options.onCard
   * @param {function(number, number): boolean} options.hasCard
   * @param {function(Object): ?HTMLElement} [options.offer] a row's switch
   * @param {function(): number} [options.count] how many labels were asked about
   * @param {function(Object, string): ?function()} options.onExplain of (answer, label): explains it, null if it cannot
   * @returns {{show: function(Object, ?Object, ?number)}} show: an answer, one of its explanations (default: the
   *   first), and the milliseconds that it took as seen from here
   */
  function create(sections, photo, options) {
    const state = { open: new Set(), asTable: false, kind: "sources" };
    photo.onChosen((chosen) => {
      for (const button of sections.account.querySelectorAll("[data-map]")) {
        button.setAttribute("aria-pressed", String(button.dataset.map === chosen));
      }
    });

    function show(answer, explanation = answer.explanations[0], seen = null) {
      const { target } = explanation;
      const found = answer.predictions.find(({ label }) => label === target);
      const onExplain = (label) => options.onExplain(answer, label);
      const predictions = Vitrine.predictions.draw(
        answer.predictions,
        target,
        onExplain,
        answer.verdict,
        options.count?.() ?? null,
      );
      replace(sections.predictions, Vitrine.warnings.draw(answer.warnings), predictions);
      const mapped = photo.show(explanation, options.preprocessing(), home(Vitrine.account.kind(explanation, state)));
      replace(
        sections.account,
        Vitrine.account.draw(explanation, {
          probability: found?.probability ?? null,
          edited: edited(answer.edit),
          state,
          onAccount: (kind) => photo.goHome(home(kind)),
          onCard: options.onCard,
          hasCard: options.hasCard,
          offer: options.offer,
          maps: mapped ? photo : null,
        }),
      );
      replace(sections.trust, Vitrine.trust.draw(answer.fidelity));
      replace(sections.timings, Vitrine.timings.draw(answer.timings_ms, seen));
    }

    return { show };
  }

  /** The map that belongs to a kind of account. */
  function home(kind) {
    return kind === "sources" ? "sources" : "";
  }

  /** What a listener is told of an answer. @returns {string} */
  function spoken(answer, explanation = answer.explanations[0]) {
    const [best] = answer.predictions;
    const trust = answer.fidelity ? ` Trust: ${Vitrine.trust.overall(answer.fidelity)}.` : "";
    const rather = explanation.contrast === null ? "" : ` rather than ${explanation.contrast}`;
    const account = `The account explains why ${explanation.target}${rather}.`;
    const said = answer.verdict ? ` ${Vitrine.predictions.judged(answer.verdict)}` : "";
    const warned = Vitrine.warnings.spoken(answer.warnings);
    return `${best.label}, ${percent(best.probability)}.${said} ${account}${trust}${warned}`;
  }

  /** Which model answered, and with which edit. @returns {string} */
  function origin({ model, edit }) {
    return `${model.name} · ${model.digest.replace("sha256:", "").slice(0, 12)}${edited(edit)}`;
  }

  /** Of an answer's edit, after other words. @returns {string} */
  function edited(edit) {
    return edit ? ` · edit ${edit.name}, ${edit.applied ? "applied" : "not applied"}` : "";
  }

  Vitrine.answer = { create, spoken, origin, edited };
}
