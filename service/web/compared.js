"use strict";
/** A prediction and its ledger before and after something was taken out, side by side. */
{
  const { el, signed, plain, percent, sum, scroller } = Vitrine.dom;
  const { rows, name, scale, bar } = Vitrine.waterfall;
  const SHOWN = 8; // rows, those that change most

  /** @param {Object} answer the API's InterveneResponse, of one list of edits @returns {HTMLElement[]} */
  function draw({ before, results: [{ after, difference }] }) {
    const [best] = after.predictions;
    const it = difference.top1_changes ? "The prediction is now" : "The prediction is still";
    const [{ target, contrast }] = before.explanations;
    const what = contrast === null ? `Logit of ${target}` : `Logit of ${target} minus that of ${contrast}`;
    const labels = difference.probabilities.map(({ label, ...both }) => changed(label, both));
    const points = (value) => `${signed(100 * value, 1)} pp`;
    return [
      el("p", { class: "verdict" }, `${it} ${best.label}, ${percent(best.probability)}.`),
      table("Probability", labels, null, percent, points),
      table(what, ...ledgers(before.explanations[0], after.explanations[0]), plain, signed),
    ];
  }

  /** A line of a table, with its bar: how much it changes. */
  function changed(title, { before, after }) {
    return { title, before, after, start: 0, end: after - before };
  }

  /** The ledgers' lines, most changed first, those of all other rows in one; and their sum. */
  function ledgers(old, now) {
    const [first, second] = [old, now].map((one) => new Map(rows(one).map((row) => [name(row), row.value])));
    const titles = [...new Map([...first, ...second]).keys()]; // there is a row `edit` only after
    const all = titles.map((one) => changed(one, { before: first.get(one) ?? 0, after: second.get(one) ?? 0 }));
    all.sort((one, other) => Math.abs(other.end) - Math.abs(one.end));
    const others = all.splice(SHOWN);
    const both = { before: sum(others.map((row) => row.before)), after: sum(others.map((row) => row.after)) };
    const total = changed("= Logit", { before: old.logit, after: now.logit });
    return [[...all, changed("All other rows", both)], total];
  }

  function table(caption, lines, total, value, change) {
    const axis = scale(total ? [...lines, total] : lines);
    const line = (row) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, row.title),
        el("td", { class: "chart" }, bar(row, axis, row === total ? "sum" : "")),
        [value(row.before), value(row.after), change(row.end)].map((text) => el("td", { class: "value" }, text)),
      );
    const numbers = ["Before", "After", "Change"].map((text) => el("th", { scope: "col", class: "value" }, text));
    const head = el("tr", {}, el("th", { scope: "col" }, caption), el("td", { class: "chart" }), numbers);
    const foot = total && el("tfoot", {}, line(total));
    const all = [el("thead", {}, head), el("tbody", {}, lines.map(line)), foot];
    return scroller(caption, el("table", { class: "account changes" }, all));
  }

  Vitrine.compared = { draw };
}
