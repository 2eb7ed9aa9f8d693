"use strict";
/** The table in which an account is drawn: a line a row, lines that open into others, headings, the total. */
{
  const { el, newId, signed, plain, sum } = Vitrine.dom;
  const { bar, ruler } = Vitrine.waterfall;

  /**
   * @typedef {Object} Options
   * @property {{open: Set, asTable: boolean, kind: string}} state kept up to date: which lines are open, whether
   *   numbers are shown in the place of bars, which account is shown
   * @property {?function(number, number)} onCard opens the card of (layer, index)
   * @property {function(number, number): boolean} [hasCard] whether there is one; default: always
   * @property {function(Object): ?HTMLElement} [offer] a row's switch; default: none has one
   * @property {?Object} maps of `Vitrine.photo`: draws a row's map on the photo
   */

  /**
   * @param {Object} explanation the API's Explanation
   * @param {{caption: string, axis: Object, more: string[], bodies: HTMLElement[], logit: number}} parts
   *   more: names of the columns that are shown with the numbers alone
   * @param {Options} options
   * @returns {HTMLElement} the table with its key, and with a button that shows it as one
   */
  function figure(explanation, { caption, axis, more, bodies, logit }, { state }) {
    const table = el(
      "table",
      { class: state.asTable ? "account numbers" : "account" },
      el("caption", { class: "visually-hidden" }, caption),
      head(axis, more),
      bodies,
      total(explanation, logit, axis, more),
    );
    const toggle = el(
      "button",
      {
        type: "button",
        class: "toggle",
        "data-key": "as-table",
        "aria-pressed": String(state.asTable),
        onclick: () => {
          state.asTable = table.classList.toggle("numbers");
          toggle.setAttribute("aria-pressed", String(state.asTable));
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
    const above = el("div", { class: "bar-head" }, el("h3", {}, "The account"), key, toggle);
    return el("div", {}, above, Vitrine.dom.scroller("The account's rows", table));
  }

  function head(axis, more) {
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

  function total(explanation, logit, axis, more) {
    const what = explanation.contrast === null ? "Logit" : "Logit difference";
    return el(
      "tfoot",
      {},
      el(
        "tr",
        { "data-row": "logit" },
        el("th", { scope: "row" }, `= ${what}`),
        el("td", { class: "chart" }, bar({ start: 0, end: logit }, axis, "sum")),
        el("td", { class: "value" }, plain(logit)),
        more.map(() => el("td", { class: "more" })),
      ),
    );
  }

  /** All terms and their sum in one line of large numbers. @param {Array<[string, number]>} terms */
  function equation(explanation, logit, terms) {
    const what = explanation.contrast === null ? "logit" : "logit difference";
    const list = terms.map(([name, value]) =>
      el("li", { class: value < 0 ? "against" : "for" }, el("b", {}, signed(value)), el("span", {}, name)),
    );
    const whole = el("li", { class: "total" }, el("b", {}, `= ${plain(logit)}`), el("span", {}, what));
    return el("ol", { class: "equation", "aria-label": "The account in one line, in logits" }, list, whole);
  }

  function body(lines) {
    return el("tbody", {}, lines);
  }

  /** A heading inside the table, with the rows' sum. @param {number} columns how many more there are */
  function group(name, members, axis, columns) {
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
        el("td", { class: "more", colspan: columns }, "sum of the rows below"),
      ),
    );
  }

  /**
   * @param {Object} row of `Vitrine.waterfall`
   * @param {*} name
   * @param {Object} axis
   * @param {string[]} cells of the columns that are shown with the numbers alone, after the running total
   * @param {{text?: string, attributes?: Object, offer?: function(Object): ?HTMLElement}} [how]
   * @returns {HTMLElement}
   */
  function line(row, name, axis, cells, { text = signed(row.value), attributes = {}, offer } = {}) {
    const id = row.layer === null ? row.kind : `${row.kind}.${row.layer}`;
    return el(
      "tr",
      { class: `row-${row.kind}`, "data-row": id, ...attributes },
      el("th", { scope: "row" }, offer?.(row), name),
      el("td", { class: "chart" }, bar(row, axis)),
      el("td", { class: "value" }, text),
      [signed(row.end), ...cells].map((cell) => el("td", { class: "more" }, cell)),
    );
  }

  /**
   * A line that opens into others.
   * @param {function(*): HTMLElement} draw the line, given its name
   * @param {{name: string, more: string, key: *, lines: HTMLElement[]}} what more: of the name, for listeners
   * @param {Set} open keys of what is open, kept up to date
   * @returns {HTMLElement[]} two bodies
   */
  function fold(draw, { name, more, key, lines }, open) {
    const id = newId();
    const inner = el("tbody", { id, class: "features", hidden: !open.has(key) }, lines);
    const button = el(
      "button",
      {
        type: "button",
        class: "row-button expands",
        "data-key": `fold ${key}`,
        "aria-expanded": String(open.has(key)),
        "aria-controls": id,
        onclick: () => {
          inner.hidden = !inner.hidden;
          button.setAttribute("aria-expanded", String(!inner.hidden));
          if (inner.hidden) open.delete(key);
          else open.add(key);
        },
      },
      name,
      el("span", { class: "visually-hidden" }, ` ${more}`),
    );
    return [body([draw(button)]), inner];
  }

  /** A feature's name, which opens its card, and what is known of it here. */
  function feature(found, layer, { onCard, hasCard = () => true }, where = []) {
    const { label, index, activation, label_score: score } = found;
    const name = label === null ? `#${index}` : [label, " ", el("span", { class: "index" }, `#${index}`)];
    const press = { type: "button", class: "feature-name", "data-key": `${layer}/${index}` };
    const shown =
      onCard && hasCard(layer, index)
        ? el("button", { ...press, onclick: () => onCard(layer, index) }, name)
        : el("span", { class: "feature-name" }, name);
    const sure = score === null ? [] : [`confidence ${plain(score, 2)}`];
    const known = [...where, `activation ${plain(activation, 2)}`, ...sure];
    return [shown, el("span", { class: "note" }, known.join(" · "))];
  }

  /** What the rows mean. @param {Object<string, string>} meaning by word */
  function glossary(meaning) {
    const words = Object.entries(meaning).map(([word, text]) => [el("dt", {}, word), el("dd", {}, text)]);
    return el("details", { class: "glossary" }, el("summary", {}, "What the rows mean"), el("dl", {}, words));
  }

  Vitrine.accountTable = { figure, equation, body, group, line, fold, feature, glossary };
}
