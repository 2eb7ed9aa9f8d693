"use strict";
/** What is said without the rows that are switched off: the question, its answer, and the command that keeps it. */
{
  const { el, replace } = Vitrine.dom;
  const MODES = { rerun: "in the running network", direct: "only in the last residual" };
  const LISTED = 4; // by their names

  /**
   * @param {Map} off of `Vitrine.switches`: by key {kind, name, edit, modes}
   * @param {HTMLElement} panel gets what is switched off, and the question
   * @param {HTMLElement} result gets the answer, which stays until the next one
   * @param {function(Object): Promise<Object>} ask of `edits` and `mode`; its errors' messages are shown
   * @returns {{start: function(), draw: function()}} start: another account is drawn
   */
  function create(off, panel, result, ask) {
    let wanted = null; // the mode that the user chose
    let asking = false;

    function start() {
      result.hidden = true;
      draw();
    }

    function draw(problem = "") {
      const all = [...off.values()];
      const can = Object.keys(MODES).filter((mode) => all.every(({ modes }) => modes.includes(mode)));
      const usual = all.some(({ kind }) => kind === "source") ? "rerun" : "direct"; // sources act at patches
      const mode = [wanted, usual, can[0]].find((name) => can.includes(name));
      const choice = (name) => {
        const state = { checked: name === mode, onchange: () => choose(name) };
        const input = el("input", { type: "radio", name: "off-mode", "data-key": `mode ${name}`, ...state });
        return el("label", {}, input, " ", MODES[name]);
      };
      panel.hidden = all.length === 0;
      replace(
        panel,
        el("p", {}, "Without ", el("b", {}, names(all))),
        el("div", { role: "group", "aria-label": "Where", class: "controls" }, can.map(choice)),
        el(
          "p",
          { class: "buttons" },
          el("button", { type: "button", "data-key": "try", onclick: () => tryIt(all, mode) }, "Try without"),
          el("button", { type: "button", class: "quiet", onclick: putBack }, "Put all back"),
        ),
        el("p", { role: "alert", class: "error" }, problem),
      );
    }

    function choose(mode) {
      wanted = mode;
      draw();
    }

    function putBack() {
      off.clear();
      for (const input of document.querySelectorAll(".off")) input.checked = false;
      draw();
    }

    async function tryIt(all, mode) {
      if (asking) return;
      asking = true;
      try {
        const answer = await ask({ edits: all.map(({ edit }) => edit), mode });
        const heading = el("h2", { tabindex: "-1" }, `Without ${names(all)}`);
        const how = el("p", { class: "note" }, `Removed ${MODES[mode]}.`);
        replace(result, heading, how, Vitrine.compared.draw(answer), keep(all, mode));
        result.hidden = false;
        draw();
        heading.focus();
      } catch (error) {
        if (error.name !== "AbortError") draw(error.message);
      } finally {
        asking = false;
      }
    }

    return { start, draw };
  }

  function names(all) {
    const listed = all.slice(0, LISTED).map(({ name }) => name);
    return [...listed, ...(all.length > LISTED ? [`${all.length - LISTED} more`] : [])].join(", ");
  }

  /** The command that makes an edit of it, to be served by its name. */
  function keep(all, mode) {
    const { quoted, line } = Vitrine.reproduce;
    const edits = all.map(({ edit }) => `--edit ${quoted(JSON.stringify(edit))}`);
    const description = `--description ${quoted(`Without ${names(all)}`)}`;
    const command = ["vitrine edit create my-edit", description, ...edits, `--mode ${mode}`, "--out my-edit.json"];
    return el(
      "details",
      {},
      el("summary", {}, "Save as an edit"),
      el("p", { class: "note" }, "For the bundle in VITRINE_BUNDLE. The service reads edits from the folder VITRINE_EDITS."),
      line(command.join(" "), "Command that creates the edit"),
    );
  }

  Vitrine.without = { create };
}
