"use strict";
/** The dialog in which cards are opened, one after another, with a way back. */
{
  const { el, percent, plain, newId } = Vitrine.dom;
  const { draw, name } = Vitrine.card;

  /**
   * @param {Object} source where cards come from
   * @param {function(number, number, string): Promise<Object>} source.card of (layer, index, dictionary); its errors'
   *   messages are shown
   * @param {?function(string, ?string, string): Promise<Object>} source.search features of a label, or the next page of
   *   them, of a dictionary
   * @param {function(number, number, string): boolean} source.hasCard
   * @returns {{open: function(number, number, string=)}}
   */
  function create(source) {
    const heading = el("h2", { id: newId(), tabindex: "-1" });
    const kicker = el("p", { class: "kicker" });
    const content = el("div", { class: "card" });
    const back = el("button", { type: "button", class: "quiet", onclick: goBack }, "← Back");
    const close = el("button", { type: "button", class: "quiet", onclick: () => dialog.close() }, "Close");
    const dialog = el(
      "dialog",
      { "aria-labelledby": heading.id, onclose: closed, onclick: (event) => event.target === dialog && dialog.close() },
      el("div", { class: "dialog-body" }, el("div", { class: "dialog-bar" }, back, close), kicker, heading, content),
    );
    document.body.append(dialog);
    const trail = []; // of functions, each of which shows what it showed
    let latest = 0; // of what was asked for: answers that come too late are not shown

    function open(layer, index, dictionary = "clt") {
      if (!dialog.open) {
        trail.length = 0;
        dialog.showModal();
      }
      go(() => showCard(layer, index, dictionary));
    }

    function go(show) {
      trail.push(show);
      return show();
    }

    function goBack() {
      trail.pop();
      trail.at(-1)();
    }

    /** The browser takes the focus back to what opened the dialog. */
    function closed() {
      latest += 1;
    }

    /** Say what is coming, and put in what comes: `fill` gets the answer. */
    async function show(above, title, promise, fill) {
      latest += 1;
      const asked = latest;
      back.hidden = trail.length < 2;
      kicker.textContent = above;
      heading.textContent = title;
      content.replaceChildren(el("p", { role: "status" }, "Loading …"));
      heading.focus();
      try {
        const answer = await promise;
        if (asked === latest) fill(answer);
      } catch (error) {
        if (asked === latest) content.replaceChildren(el("p", { role: "alert", class: "error" }, error.message));
      }
      dialog.scrollTop = 0;
    }

    function showCard(layer, index, dictionary) {
      const onLabel = source.search && ((label) => go(() => showLabel(label, dictionary)));
      const onCard = (one, other) => open(one, other, dictionary);
      const known = { onCard, hasCard: (one, other) => source.hasCard(one, other, dictionary), onLabel };
      const above = `${dictionary === "clt" ? "Layer" : "Residual stream after layer"} ${layer}, feature #${index}`;
      return show(above, `#${index}`, source.card(layer, index, dictionary), (card) => {
        heading.textContent = name(card);
        content.replaceChildren(...draw(card, known));
      });
    }

    function showLabel(label, dictionary) {
      const list = el("tbody", {});
      const more = el("button", { type: "button" }, "More");
      const put = (page) => {
        list.append(...page.features.map((feature) => line(feature, dictionary)));
        more.hidden = page.next === null;
        more.onclick = async () => put(await source.search(label, page.next, dictionary));
      };
      const head = ["Feature", "Score", "AUROC", "Fires on"].map((text) => el("th", { scope: "col" }, text));
      return show("Features whose label contains", label, source.search(label, null, dictionary), (page) => {
        put(page);
        const table = el("table", { class: "list" }, el("thead", {}, el("tr", {}, head)), list);
        const found = `${page.total} found, best labels first.`;
        content.replaceChildren(el("p", { class: "note" }, found), Vitrine.dom.scroller("Features found", table), more);
      });
    }

    function line({ layer, index, label, label_score: score, label_auroc: auroc, frequency_cls: often }, dictionary) {
      const number = el("span", { class: "index" }, ` layer ${layer} #${index}`);
      const press = { type: "button", class: "link", onclick: () => open(layer, index, dictionary) };
      const button = el("button", press, label, number);
      const cells = [plain(score, 2), auroc === null ? "–" : plain(auroc, 2), percent(often)];
      return el("tr", {}, el("th", { scope: "row" }, button), cells.map((text) => el("td", { class: "value" }, text)));
    }

    return { open };
  }

  Vitrine.cards = { create };
}
