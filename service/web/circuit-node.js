"use strict";
/** What is known of one node of a circuit: numbers, where in the photo, what feeds it, what it feeds. */
{
  const { el, signed, percent, plain, scroller } = Vitrine.dom;
  const { name, targetName } = Vitrine.circuitGraph;
  const LISTED = 12; // edges on either side

  /**
   * @param {Object} circuit the API's GroupedCircuit
   * @param {number} place of the node in `groups`
   * @param {Object} options
   * @param {Object[]} options.edges of `Vitrine.circuitGraph.strengths`
   * @param {function(number)} options.onChosen goes to another node
   * @returns {HTMLElement[]}
   */
  function draw(circuit, place, { edges, onChosen }) {
    const group = circuit.groups[place];
    const into = edges.filter(({ target }) => target === place);
    const from = edges.filter(({ source }) => source === place);
    return [
      numbers(circuit, group),
      where(circuit, group),
      flows("Fed by", "what feeds it", into, ({ source }) => source, circuit, onChosen),
      group.unfollowed_share === null ? null : unfollowed(group),
      flows("Feeds", "what it feeds", from, ({ target }) => target, circuit, onChosen),
    ].filter(Boolean);
  }

  function numbers({ images }, group) {
    const rows = [
      ["Influence", percent(group.influence)],
      ["Direct contribution to the logit", signed(group.contribution)],
      ["Tokens", plain(group.tokens, images > 1 ? 1 : 0)],
    ];
    if (images > 1) rows.push(["Images", `${group.images} of ${images}`]);
    const row = ([title, value]) => el("div", {}, el("dt", {}, title), el("dd", {}, value));
    return el("dl", { class: "measured" }, rows.map(row));
  }

  /** At which tokens, in words; the photo shows the patches. */
  function where({ columns }, { where: nodes }) {
    if (nodes.length === 0) return null;
    const one = ({ token, influence, activation }) => {
      const [row, column] = [Math.floor((token - 1) / columns) + 1, ((token - 1) % columns) + 1];
      const at = token === 0 ? "class token" : `row ${row}, column ${column}`;
      const strong = activation === null ? "" : `, activation ${plain(activation, 2)}`;
      return el("li", {}, `${at}: ${percent(influence, 2)}${strong}`);
    };
    const list = el("ul", { class: "tokens" }, nodes.map(one));
    const count = nodes.length === 1 ? "one token" : `${nodes.length} tokens`;
    return el("details", {}, el("summary", {}, `Where: ${count}`), scroller("Tokens", list));
  }

  function unfollowed({ unfollowed_share: share }) {
    const said = `${percent(share, 0)} of its input comes from features that were not followed back.`;
    return el("p", { class: "note" }, said);
  }

  function flows(title, said, edges, end, circuit, onChosen) {
    if (edges.length === 0) return null;
    const line = (edge) => {
      const place = end(edge);
      const group = circuit.groups[place];
      const other =
        place === null
          ? targetName(circuit)
          : el("button", { type: "button", class: "link", onclick: () => onChosen(place) }, name(group), index(group));
      const images = circuit.images > 1 ? el("td", { class: "value" }, `${edge.images} of ${circuit.images}`) : null;
      const weight = el("td", { class: "value" }, signed(edge.weight));
      return el("tr", {}, el("th", { scope: "row" }, other), weight, images);
    };
    const columns = ["Node", "Weight", ...(circuit.images > 1 ? ["Images"] : [])];
    const head = columns.map((text) => el("th", { scope: "col" }, text));
    const body = el("tbody", {}, edges.slice(0, LISTED).map(line));
    const rest = edges.length - LISTED;
    return el(
      "section",
      {},
      el("h3", {}, title),
      scroller(said, el("table", { class: "list" }, el("thead", {}, el("tr", {}, head)), body)),
      rest > 0 && el("p", { class: "note" }, `And ${rest} weaker ones.`),
    );
  }

  function index({ kind, layer, index: number, label }) {
    if (kind !== "feature") return null;
    return el("span", { class: "index" }, ` layer ${layer}`, label === null ? null : ` #${number}`);
  }

  Vitrine.circuitNode = { draw };
}
