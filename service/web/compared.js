"use strict";
/** A prediction and its ledger before and after something was taken out, side by side. */
{
  const { el, signed, plain, percent, sum, scroller } = Vitrine.dom;
  const { rows, name, scale, bar } = Vitrine.waterfall;
  const SHOWN = 8; // rows, those that change most

  /** @param {Object} answer the API's InterveneResponse, of one list of edits @returns {HTMLElement[]} */
  function draw({ before, results: [{ after, difference }] }) {
    const [best] = after.predictions;
    const it = difference.top1_changes ? "Now it is" : "It is still";
    const said = `${it} ${best.label}, ${percent(best.probability)}.`;
    const [{ target, contrast }] = before.explanations;
    const what = contrast === null ? `Logit of ${target}` : `Logit of ${target} less that of ${contrast}`;
    const labels = difference.probabilities.map(({ label, ...both }) => ({ name: label, ...both }));
    const points = (value) => `${signed(100 * value, 1)} points`;
    return [
      el("p", { class: "verdict" }, said),
      table("Probability", labels, percent, points),
      table(what, changes(before.explanations[0], after.explanations[0]), plain, signed),
    ];
  }

  /** The ledgers' rows, most changed first; the last but one are all others, the last is the logit. */
  function changes(old, now) {
    const [before, after] = [old, now].map((one) => new Map(rows(one).map((row) => [name(row), row.value])));
    const all = [...new Map([...before, ...after]).keys()].map((row) => ({
      name: row,
      before: before.get(row) ?? 0, // there is a row `edit` only after
      after: after.get(row) ?? 0,
    }));
    all.sort((one, other) => Math.abs(other.after - other.before) - Math.abs(one.after - one.before));
    const rest = all.splice(SHOWN);
    const others = (side) => sum(rest.map((row) => row[side]));
    return [
      ...all,
      { name: "All other rows", before: others("before"), after: others("after") },
      { name: "= all rows", before: old.logit, after: now.logit },
    ];
  }

  function table(caption, items, value, change) {
    const bars = items.map(({ before, after }) => ({ start: 0, end: after - before }));
    const axis = scale(bars);
    const head = [caption, "", "Before", "After", "Change"].map((text) => el("th", { scope: "col" }, text));
    const lines = items.map((item, place) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, item.name),
        el("td", { class: "chart" }, bar(bars[place], axis)),
        [value(item.before), value(item.after), change(item.after - item.before)].map((text) =>
          el("td", { class: "value" }, text),
        ),
      ),
    );
    return scroller(
      caption,
      el("table", { class: "account changes" }, el("thead", {}, el("tr", {}, head)), el("tbody", {}, lines)),
    );
  }

  Vitrine.compared = { draw };
}
