"use strict";
/** Circuits of one question on the screen: one is drawn, with what is chosen of it, beside the photo. */
Vitrine.circuitPage = (() => {
  const { el, replace, percent, plain, scroller } = Vitrine.dom;
  const { strengths, name } = Vitrine.circuitGraph;
  const at = (id) => document.getElementById(id);
  const DICTIONARIES = { clt: "the MLPs' outputs (CLT)", residual: "the residual stream (SAEs)" };
  const picture = el("img", { alt: "The photo" });
  const layer = el("div", { class: "layer" });
  const photo = el("div", { class: "photo" }, picture, layer);
  const nodes = el("div", {});
  let circuits, image, preprocessing, card; // of `create`
  let latest = 0; // of the circuits asked for: one that comes too late is not drawn
  let circuit, all, edges, graph; // those that are drawn

  /**
   * @param {Object} options
   * @param {{dictionary: string, get: function(): Promise<Object>}[]} options.circuits the first is shown; `get` gives
   *   the API's GroupedCircuit as `circuit`, its `title`, and how many groups it has in `all`
   * @param {?string} options.image URL of the photo; null: of many
   * @param {Object} options.preprocessing the manifest's
   * @param {function(number, number, string): Promise<?Object>} options.card the API's CardResponse of (layer, index,
   *   dictionary)
   */
  function create(options) {
    ({ circuits, image, preprocessing, card } = options);
    at("drawing").after(nodes);
    if (circuits.length > 1) at("scores").before(el("fieldset", { class: "signs" }, legend(), circuits.map(choice)));
    if (image === null) at("frame").hidden = true;
    else load();
    use(0);
  }

  /** From now on another circuit of the same question. */
  async function use(number) {
    latest += 1;
    const asked = latest;
    replace(at("problem"));
    at("scores").textContent = at("status").textContent = "Loading …";
    at("main").setAttribute("aria-busy", "true");
    try {
      const found = await circuits[number].get();
      if (asked === latest) draw(found);
    } catch (error) {
      if (asked === latest) fail(error.message, () => use(number));
    }
  }

  /** Nothing is drawn beside what could not be had. */
  function fail(sentence, again) {
    for (const part of [at("drawing"), nodes, at("chosen"), at("scores"), layer]) replace(part);
    at("caption").textContent = at("status").textContent = "";
    circuit = undefined;
    replace(at("problem"), [sentence, " ", el("button", { type: "button", onclick: again }, "Try again")]);
    at("main").setAttribute("aria-busy", "false");
  }

  function draw(found) {
    ({ circuit, all } = found);
    edges = strengths(circuit);
    at("origin").textContent = `${circuit.model.name} · ${circuit.model.digest.replace("sha256:", "").slice(0, 12)}`;
    at("question").textContent = found.title;
    document.title = `${found.title}: a circuit`;
    at("scores").textContent = scores();
    at("status").textContent = "";
    at("main").setAttribute("aria-busy", "false");
    replace(at("drawing"));
    graph = Vitrine.circuitGraph.create(at("drawing"), circuit, edges, chosen);
    const warnings = circuit.warnings.map(({ message }) => el("li", {}, message));
    replace(nodes, [
      warnings.length ? el("ul", { class: "warnings" }, warnings) : null,
      el("details", {}, el("summary", {}, "The nodes as a table"), table()),
    ]);
    show(null);
    map(null);
  }

  function legend() {
    return el("legend", {}, "Features of");
  }

  function choice({ dictionary }, number) {
    const radio = { type: "radio", name: "dictionary", checked: number === 0, onchange: () => use(number) };
    return el("label", {}, el("input", radio), el("span", {}, DICTIONARIES[dictionary]));
  }

  function placeOf(number, index) {
    const isIt = (group) => group.kind === "feature" && group.layer === number && group.index === index;
    const found = circuit.groups.findIndex(isIt);
    return found < 0 ? null : found;
  }

  function scores() {
    const { embeddings, errors, left_out: left } = circuit.scores;
    const count = circuit.groups.length;
    return [
      count < all ? `The ${count} most influential of ${all} nodes are drawn, each summed over all tokens. ` : "",
      `Followed back, the influence ends at embeddings (${percent(embeddings, 0)}), errors (${percent(errors, 0)}) and features `,
      `that were not followed further (${percent(left, 0)}). `,
      `${percent(circuit.kept_share)} of the active features are in the circuit.`,
    ].join("");
  }

  async function load() {
    at("frame").append(photo);
    picture.src = image;
    await picture.decode();
    picture.classList.toggle("pixels", Math.min(picture.naturalWidth, picture.naturalHeight) < 100);
    photo.style.setProperty("--ratio", String(picture.naturalWidth / picture.naturalHeight));
    photo.style.setProperty("--grey", "1");
    map(null);
  }

  /** Where in the photo a node lies, or all features of the circuit: its influence, patch by patch. */
  function map(place) {
    if (circuit === undefined || image === null || picture.naturalWidth === 0) return;
    const values = Array(circuit.rows * circuit.columns).fill(0);
    let token = 0; // at the class token, which lies nowhere
    const shown = place === null ? circuit.groups.filter(({ kind }) => kind === "feature") : [circuit.groups[place]];
    for (const { token: number, influence } of shown.flatMap((group) => group.where)) {
      if (number === 0) token += influence;
      else values[number - 1] += influence;
    }
    const [width, height] = [picture.naturalWidth, picture.naturalHeight];
    const view = { sign: "both", opacity: 0.8, patch: null };
    const drawn = { values, least: token / 10, rows: circuit.rows, columns: circuit.columns, outliers: [] };
    const part = Vitrine.heatmap.seen(width, height, preprocessing);
    replace(layer, Vitrine.heatmap.overlay(drawn, view, { width, height, seen: part }));
    const where = place === null ? "The circuit's features" : name(circuit.groups[place]);
    const cls = token > 0 ? ` ${percent(token)} is at the class token, which has no place in the photo.` : "";
    at("caption").textContent = `${where}: a deeper blue means more influence from there.${cls}`;
  }

  function chosen(place) {
    show(place);
    map(place);
    if (place === null) return;
    const group = circuit.groups[place];
    const share = percent(group.influence);
    at("status").textContent = `${name(group)}: ${share} of the influence. Details are next to the graph.`;
    if (!matchMedia("(min-width: 60rem)").matches) at("chosen").focus();
  }

  function show(place) {
    if (place === null) {
      const how =
        "Each box is a feature, the errors of a layer, or the photo's embeddings, with its share of the influence on the " +
        "target. Lower boxes feed higher ones. Wider lines carry more of that influence; blue lines add, orange dashed " +
        "lines subtract. Lines from errors and embeddings are drawn only when one of them, or a box that they feed, is " +
        "selected. Select a box to see its card, where it is in the photo, what feeds it and what it feeds.";
      replace(at("chosen"), el("h2", {}, "How to read this"), el("p", {}, how));
      return;
    }
    const group = circuit.groups[place];
    const kind = {
      feature: `${circuit.dictionary === "clt" ? "Layer" : "Residual stream after layer"} ${group.layer}, feature #${group.index}`,
      error:
        circuit.dictionary === "clt"
          ? "What an MLP wrote that no feature explains"
          : "What is in the stream that its autoencoder misses",
      embedding: "The tokens as they enter the first layer",
    };
    const go = (other) => {
      graph.choose(other);
      at("chosen").focus();
    };
    const known = el("div", {}); // the card, which may come later
    replace(
      at("chosen"),
      el("p", { class: "kicker" }, kind[group.kind]),
      el("h2", {}, name(group)),
      Vitrine.circuitNode.draw(circuit, place, { edges, onChosen: go }),
      known,
      el("p", {}, el("button", { type: "button", onclick: () => graph.choose(null) }, "Show the whole circuit")),
    );
    if (group.kind === "feature") showCard(known, group, go);
  }

  async function showCard(frame, { layer: number, index }, go) {
    const onCard = (...other) => go(placeOf(...other));
    const hasCard = (...other) => placeOf(...other) !== null;
    try {
      const found = await card(number, index, circuit.dictionary);
      if (found) replace(frame, el("div", { class: "card" }, Vitrine.card.draw(found, { onCard, hasCard, onLabel: null })));
    } catch (error) {
      replace(frame, el("p", { role: "alert", class: "error" }, error.message));
    }
  }

  function table() {
    const many = circuit.images > 1;
    const head = ["Layer", "Node", "Influence", "To the logit", "Tokens", ...(many ? ["Images"] : [])];
    const line = (group) => {
      const cells = [percent(group.influence), plain(group.contribution), plain(group.tokens, many ? 1 : 0)];
      if (many) cells.push(String(group.images));
      const title = group.label === null ? name(group) : `${name(group)} #${group.index}`;
      return el(
        "tr",
        {},
        el("td", {}, group.layer === null ? "–" : String(group.layer)),
        el("th", { scope: "row" }, title),
        cells.map((text) => el("td", { class: "value" }, text)),
      );
    };
    const top = el("tr", {}, head.map((text) => el("th", { scope: "col" }, text)));
    const body = el("tbody", {}, circuit.groups.map(line));
    return scroller("Nodes", el("table", { class: "list" }, el("thead", {}, top), body));
  }
  return { create, fail };
})();
