"use strict";
/** The direct ledger: what each layer wrote to the class token, as a sum in one line and as a waterfall. */
{
  const { el, signed, tiny, percent, sum } = Vitrine.dom;
  const { rows, name, featureRows, scale } = Vitrine.waterfall;
  const { figure, equation, body, group, line, fold, feature, glossary } = Vitrine.accountTable;

  const MORE = ["Running total", "Share of all rows", "Change in probability if removed"];
  const MEANING = {
    Prior: "What the class token and its position contribute: the same for every image.",
    Attention: "What each layer's attention read from the image and wrote to the class token.",
    Features: "What each layer's features (its cross-layer transcoder, CLT) wrote, in place of its MLP.",
    MLPs: "What each layer's MLP wrote, in a bundle without a CLT.",
    Bias: "Constants of the transcoder and of the last normalisation.",
    Error: "What the MLPs wrote that no feature explains. It has its own row and is never spread over other rows.",
    Edit: "What an edit itself wrote: the directions that it removes from the residual stream.",
    Remainder: "Rounding: the logit minus the sum of all rows.",
  };

  /**
   * @param {Object} explanation the API's Explanation
   * @param {Object} options of `Vitrine.accountTable`
   * @returns {HTMLElement[]}
   */
  function draw(explanation, options) {
    const { prior, attention, clt, mlp, bias, error, edit } = explanation.ledger;
    const terms = [
      ["prior", prior],
      ["attention", sum(attention)],
      clt.length ? ["features", sum(clt)] : ["MLPs", sum(mlp)],
      ["bias", bias],
      ...(clt.length ? [["error", error]] : []),
      ...(edit ? [["edit", edit]] : []),
    ];
    return [equation(explanation, explanation.logit, terms), table(explanation, options), glossary(MEANING)];
  }

  function table(explanation, options) {
    const all = rows(explanation);
    const parts = new Map(all.filter((row) => row.kind === "clt").map((row) => [row.layer, featureRows(row)]));
    const axis = scale([...all, ...[...parts.values()].flat()]);
    const gross = sum(all.filter(({ kind }) => kind !== "remainder").map(({ value }) => Math.abs(value)));
    const of = (kind) => all.filter((row) => row.kind === kind);

    function draw(row, name, text) {
      const share = row.kind === "remainder" ? "" : percent(gross ? Math.abs(row.value) / gross : 0);
      const effect = row.account ? `${signed(100 * row.account.drop_effect, 1)} points` : "";
      return line(row, name, axis, [share, effect], { text, offer: options.offer });
    }

    function layer(row) {
      const lines = parts.get(row.layer).map((part) => {
        if (part.kind === "others") return draw(part, "all other features");
        return draw(part, feature(part.feature, row.layer, options));
      });
      const what = { name: `CLT ${row.layer}`, more: "features", key: row.layer, lines };
      return fold((name) => draw(row, name), what, options.state.open);
    }

    const bodies = [
      body(of("prior").map((row) => draw(row, "Prior"))),
      group("Attention, by layer", of("attention"), axis, MORE.length),
      body(of("attention").map((row) => draw(row, attentionName(row, options)))),
      group(`${parts.size ? "Features" : "MLPs"}, by layer`, parts.size ? of("clt") : of("mlp"), axis, MORE.length),
      of("clt").map(layer),
      body(of("mlp").map((row) => draw(row, name(row)))),
      body(of("bias").map((row) => draw(row, "Bias"))),
      body(of("error").map((row) => draw(row, "Error"))),
      body(of("edit").map((row) => draw(row, "Edit"))),
      body(of("remainder").map((row) => draw(row, "Remainder", tiny(row.value)))),
    ];
    const { target, contrast, logit } = explanation;
    const rather = contrast === null ? "" : ` rather than ${contrast}`;
    const what = "what each part of the network added, in logits. The rows add up to the last row.";
    const caption = `Why ${target}${rather}: ${what}`;
    return figure(explanation, { caption, axis, more: MORE, bodies, logit }, options);
  }

  function attentionName(row, { maps }) {
    const name = `Attention ${row.layer}`;
    const key = String(row.layer);
    if (!maps?.has(key)) return name;
    const press = { type: "button", class: "row-button where", "data-key": name, onclick: () => maps.choose(key) };
    return el("button", press, name, el("span", { class: "visually-hidden" }, ": show in the heat map"));
  }

  Vitrine.ledger = { draw };
}
