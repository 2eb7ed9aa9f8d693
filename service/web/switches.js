"use strict";
/** Switches on the account's rows. What asks about those that are off is loaded with the first of them. */
{
  const { el } = Vitrine.dom;
  const DIRECT = ["prior", "bias", "error"]; // rows that nothing in the running network computes
  const KINDS = ["attention", "clt", "mlp", "feature", "source", ...DIRECT]; // that have a switch

  /**
   * @param {function(Map): Object} ask makes `Vitrine.without`, once that is loaded, of what is off:
   *   by key {kind, name, edit, modes}
   * @param {function(Error)} onError told that it cannot be loaded
   * @returns {Object}
   *   start(possible, isNew): the modes for the answer that is drawn next; isNew: nothing is off any more;
   *   offer(row): of `Vitrine.waterfall`: its switch, null if it has none
   */
  function create(ask, onError) {
    const off = new Map();
    let modes = [];
    let question = null;

    function start(possible, isNew) {
      modes = possible;
      if (isNew || modes.length === 0) off.clear();
      question?.start();
    }

    function offer(row) {
      const able = DIRECT.includes(row.kind) ? modes.filter((mode) => mode === "direct") : modes;
      if (!KINDS.includes(row.kind) || able.length === 0) return null;
      const { key, ...what } = { ...taken(row), modes: able };
      const change = { checked: off.has(key), onchange: ({ target }) => turn(key, target.checked ? what : null) };
      const press = { type: "checkbox", class: "off", "data-key": `off ${key}`, title: "Try without", ...change };
      return el("input", { ...press, "aria-label": `Without ${what.name}` });
    }

    async function turn(key, what) {
      if (what) off.set(key, what);
      else off.delete(key);
      try {
        await import("./compared.js");
        await import("./without.js");
        question ??= ask(off);
        question.draw();
      } catch (error) {
        onError(error);
      }
    }

    return { start, offer };
  }

  /** What a row's switch takes out. */
  function taken({ kind, layer, feature }) {
    if (feature) {
      const edit = { op: "ablate", layer: layer ?? feature.layer, index: feature.index };
      const name = `${feature.label ?? ""} #${edit.index} of layer ${edit.layer}`.trim();
      return { key: `${edit.layer}/${edit.index}`, kind, name, edit };
    }
    const edit = { op: "ablate", row: kind, ...(layer !== null && { layer }) };
    const name = Vitrine.waterfall.name({ kind, layer });
    return { key: name, kind, name, edit };
  }

  Vitrine.switches = { create };
}
