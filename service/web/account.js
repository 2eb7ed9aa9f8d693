"use strict";
/** The account of one explained logit: the question, the sum in one line, and the waterfall with its table. */
{
  const { el, newId, signed, plain, tiny, percent, sum } = Vitrine.dom;
  const { rows, featureRows, scale, bar, ruler } = Vitrine.waterfall;

  const MEANING = {
    Prior: "What the class token and its position bring: the same for every image.",
    Attention: "What each layer's attention wrote to the class token: what was read from the image, and where.",
    Features: "What each layer's sparse features (its cross-layer transcoder, CLT) wrote, in the place of its MLP.",
    Bias: "Constants of the transcoder and of the last normalisation.",
    Error: "What the MLPs did and no feature says. It is shown, never spread over other rows.",
    Remainder: "Rounding: what is left when all rows are taken from the logit.",
  };

  /**
   * @param {Object} explanation the API's Explanation
   * @param {Object} options
   * @param {?number} options.probability of the target, if it is known
   * @param {Set<number>} options.open layers whose features are shown; kept up to date
   * @param {boolean} options.asTable whether numbers are shown in the place of bars
   * @param {function(boolean)} options.onTable told when that changes
   * @param {?function(number, number)} options.onCard opens the card of (layer, index)
   * @param {function(number, number): boolean} [options.hasCard] whether there is one; default: always
   * @param {?function(number)} options.onLayer shows an attention layer in the heat map
   * @returns {HTMLElement[]}
   */
  function draw(explanation, options) {
    return [title(explanation, options), equation(explanation), figure(explanation, options), glossary()];
  }

  function title(explanation, { probability }) {
    const { target, contrast, logit } = explanation;
    const rather = contrast === null ? "" : [" rather than ", el("em", {}, contrast)];
    const what = contrast === null ? "Logit " : "Logit difference ";
    const share = contrast === null && probability !== null ? ` · probability ${percent(probability)}` : "";
    return el(
      "div",
      { class: "question" },
      el("h2", { id: "why" }, "Why ", el("em", {}, target), rather, "?"),
      el("p", { class: "result" }, what, el("strong", {}, plain(logit)), share),
    );
  }

  /** prior + attention + features + bias + error = logit, as one line of large numbers. */
  function equation(explanation) {
    const { prior, attention, clt, bias, error } = explanation.ledger;
    const terms = [
      ["prior", prior],
      ["attention", sum(attention)],
      ["features", sum(clt)],
      ["bias", bias],
      ["error", error],
    ];
    const what = explanation.contrast === null ? "logit" : "logit difference";
    const list = terms.map(([name, value]) =>
      el("li", { class: value < 0 ? "against" : "for" }, el("b", {}, signed(value)), el("span", {}, name)),
    );
    const total = el("li", { class: "total" }, el("b", {}, `= ${plain(explanation.logit)}`), el("span", {}, what));
    return el("ol", { class: "equation", "aria-label": "The account in one line, in logits" }, list, total);
  }

  function figure(explanation, options) {
    const { asTable, onTable } = options;
    const all = rows(explanation);
    const parts = new Map(all.filter((row) => row.kind === "clt").map((row) => [row.layer, featureRows(row)]));
    const axis = scale([...all, ...[...parts.values()].flat()]);
    const gross = sum(all.filter(({ kind }) => kind !== "remainder").map(({ value }) => Math.abs(value)));
    const context = { axis, gross, options, parts };
    const of = (kind) => all.filter((row) => row.kind === kind);
    const table = el(
      "table",
      { class: asTable ? "account numbers" : "account" },
      el("caption", { class: "visually-hidden" }, caption(explanation)),
      head(axis),
      body(of("prior").map((row) => line(row, "Prior", context))),
      group("Attention, by layer", of("attention"), context),
      body(of("attention").map((row) => line(row, attentionName(row, options), context))),
      group("Features, by layer", of("clt"), context),
      of("clt").map((row) => layer(row, context)),
      body(of("bias").map((row) => line(row, "Bias", context))),
      body(of("error").map((row) => line(row, "Error", context))),
      body(of("remainder").map((row) => line(row, "Remainder", context, tiny(row.value)))),
      total(explanation, context),
    );
    const toggle = el(
      "button",
      {
        type: "button",
        class: "toggle",
        "data-key": "as-table",
        "aria-pressed": String(asTable),
        onclick: () => {
          const numbers = table.classList.toggle("numbers");
          toggle.setAttribute("aria-pressed", String(numbers));
          onTable(numbers);
        },
      },
      "Show as table",
    );
    const key = el(
      "p",
      { class: "key" },
      el("span", { class: "swatch for" }),
      `for ${explanation.target} `,
      el("span", { class: "swatch against" }),
      explanation.contrast === null ? "against it" : `for ${explanation.contrast}`,
    );
    const bar = el("div", { class: "bar-head" }, el("h3", {}, "The account"), key, toggle);
    return el("div", {}, bar, Vitrine.dom.scroller("The account's rows", table));
  }

  function caption({ target, contrast }) {
    const rather = contrast === null ? "" : ` rather than ${contrast}`;
    return `Why ${target}${rather}: what each part of the network added, in logits. The rows add up to the last one.`;
  }

  function head(axis) {
    const more = ["Running total", "Share of all rows", "Probability, if taken out"];
    return el(
      "thead",
      {},
      el(
        "tr",
        {},
        el("th", { scope: "col" }, "Row"),
        el("td", { class: "chart" }, ruler(axis)),
        el("th", { scope: "col", class: "value" }, "Logits"),
        more.map((text) => el("th", { scope: "col", class: "more" }, text)),
      ),
    );
  }

  function body(lines) {
    return el("tbody", {}, lines);
  }

  /** A heading inside the table, with the rows' sum. */
  function group(name, members, { axis }) {
    const value = sum(members.map((row) => row.value));
    return el(
      "tbody",
      { class: "group" },
      el(
        "tr",
        {},
        el("th", { scope: "rowgroup" }, name),
        el("td", { class: "chart" }, bar(null, axis)),
        el("td", { class: "value" }, el("span", { class: "visually-hidden" }, "together "), signed(value)),
        el("td", { class: "more", colspan: "3" }, "sum of the rows below"),
      ),
    );
  }

  function line(row, name, { axis, gross }, text = signed(row.value)) {
    const effect = row.account ? `${signed(100 * row.account.drop_effect, 1)} points` : "";
    const share = row.kind === "remainder" ? "" : percent(gross ? Math.abs(row.value) / gross : 0);
    return el(
      "tr",
      { class: `row-${row.kind}`, "data-row": row.layer === null ? row.kind : `${row.kind}.${row.layer}` },
      el("th", { scope: "row" }, name),
      el("td", { class: "chart" }, bar(row, axis)),
      el("td", { class: "value" }, text),
      [signed(row.end), share, effect].map((cell) => el("td", { class: "more" }, cell)),
    );
  }

  function attentionName(row, { onLayer }) {
    const name = `Attention ${row.layer}`;
    if (!onLayer) return name;
    const press = { type: "button", class: "row-button where", "data-key": name, onclick: () => onLayer(row.layer) };
    return el("button", press, name, el("span", { class: "visually-hidden" }, ": show in the heat map"));
  }

  /** A layer's clt row, and its features, which the row's button shows and hides. */
  function layer(row, context) {
    const { open } = context.options;
    const id = newId();
    const features = el(
      "tbody",
      { id, class: "features", hidden: !open.has(row.layer) },
      context.parts.get(row.layer).map((part) => featureLine(part, context)),
    );
    const button = el(
      "button",
      {
        type: "button",
        class: "row-button expands",
        "data-key": `clt ${row.layer}`,
        "aria-expanded": String(open.has(row.layer)),
        "aria-controls": id,
        onclick: () => {
          features.hidden = !features.hidden;
          button.setAttribute("aria-expanded", String(!features.hidden));
          if (features.hidden) open.delete(row.layer);
          else open.add(row.layer);
        },
      },
      `CLT ${row.layer}`,
      el("span", { class: "visually-hidden" }, " features"),
    );
    return [body([line(row, button, context)]), features];
  }

  function featureLine(part, context) {
    if (part.kind === "others") return line(part, "all other features", context);
    const { feature, layer } = part;
    const { onCard, hasCard = () => true } = context.options;
    const number = `#${feature.index}`;
    const name = feature.label === null ? number : [feature.label, " ", el("span", { class: "index" }, number)];
    const press = { type: "button", class: "feature-name", "data-key": `${layer}/${feature.index}` };
    const button =
      onCard && hasCard(layer, feature.index)
        ? el("button", { ...press, onclick: () => onCard(layer, feature.index) }, name)
        : el("span", { class: "feature-name" }, name);
    const sure = feature.label_score === null ? "" : ` · confidence ${plain(feature.label_score, 2)}`;
    const note = el("span", { class: "note" }, `activation ${plain(feature.activation, 2)}${sure}`);
    return line(part, [button, note], context);
  }

  function total(explanation, { axis }) {
    const what = explanation.contrast === null ? "Logit" : "Logit difference";
    const span = { start: 0, end: explanation.logit };
    return el(
      "tfoot",
      {},
      el(
        "tr",
        { "data-row": "logit" },
        el("th", { scope: "row" }, `= ${what}`),
        el("td", { class: "chart" }, bar(span, axis, "sum")),
        el("td", { class: "value" }, plain(explanation.logit)),
        ["", "", ""].map(() => el("td", { class: "more" })),
      ),
    );
  }

  function glossary() {
    const words = Object.entries(MEANING).map(([word, meaning]) => [el("dt", {}, word), el("dd", {}, meaning)]);
    return el("details", { class: "glossary" }, el("summary", {}, "What the rows mean"), el("dl", {}, words));
  }

  Vitrine.account = { draw };
}
