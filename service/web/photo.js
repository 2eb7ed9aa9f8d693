"use strict";
/** The photo under a map of its patches: how it is looked at, by mouse, finger or arrow keys, and what is read. */
{
  const { el, replace, signed } = Vitrine.dom;
  const { seen, overlay, legend, table } = Vitrine.heatmap;
  const HELP = "To read a patch's value, point at it, or focus the map and use the arrow keys.";
  const STEPS = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };

  /**
   * @param {HTMLElement} frame gets the photo and the map
   * @param {HTMLElement} panel gets the map's controls
   * @returns {Object}
   *   load(url): another photo; resolves to whether it can be shown; reveal(): to it, if it is out of sight;
   *   show(explanation, preprocessing, home): its maps, with the manifest's preprocessing; whether there are any;
   *   goHome(key): the map that is shown where none was chosen, from now on, and the choice is taken back;
   *   has(key), choose(key), chosen(): of `Vitrine.maps`; choose(null) takes the choice back;
   *   preview(key): a map for a while, until preview(null);
   *   onChosen(listener): told the key of each map that is chosen, null of none
   */
  function create(frame, panel) {
    const view = { sign: "both", opacity: 0.75, patch: null };
    const keys = { home: "", chosen: null, preview: null }; // of maps; null: none
    let maps = [];
    let explanation = null;
    let preprocessing = null;
    let told = () => {};

    const image = el("img", { alt: "The photo" });
    const drawn = el("div", { class: "layer" });
    const map = el("div", {
      class: "map",
      tabindex: "0",
      role: "application",
      "aria-roledescription": "heat map",
      onkeydown: step,
      onpointerdown: point,
      onpointermove: point,
      onfocus: () => pick(view.patch ?? 0),
    });
    const photo = el("div", { class: "photo" }, image, drawn, map);
    const readout = el("p", { class: "readout", "aria-live": "polite" }, HELP);
    const heading = el("h3", {});
    const spoken = el("p", { class: "visually-hidden", role: "status" });
    const choices = el("select", { onchange: () => take(choices.value) });
    const choiceName = el("span", {});
    const signs = ["both", "for", "against"].map(signChoice);
    const slider = el("input", { type: "range", min: 0, max: 100, value: 100 * view.opacity, oninput: fade });
    const scale = el("div", {});
    const adds = el("p", { class: "note" });
    const caption = el("p", { class: "caption", hidden: true }); // beside the photo, for maps that are drawn from afar
    const swatch = el("span", { class: "swatch cut" });
    const cut = el("p", { class: "note" }, swatch, "Darkened: cropped before the model saw it.");
    const numbers = el("div", {});
    const outliers = el("p", { class: "note" }, "Circles mark outlier patches, whose position in the photo means little.");
    panel.append(
      heading,
      spoken,
      readout,
      scale,
      cut,
      el(
        "div",
        { class: "controls" },
        el("label", {}, choiceName, choices),
        el("fieldset", { class: "signs" }, el("legend", { class: "visually-hidden" }, "Which sign to show"), signs),
        el("label", { class: "slider" }, "Opacity ", slider),
      ),
      adds,
      outliers,
      el("details", {}, el("summary", {}, "Patch values as a table"), numbers),
    );
    frame.append(photo, caption);
    panel.hidden = photo.hidden = true;

    function signChoice(sign) {
      const radio = { type: "radio", name: "vitrine-sign", value: sign, checked: sign === view.sign };
      const choose = () => {
        view.sign = sign;
        draw();
      };
      return el("label", {}, el("input", { ...radio, onchange: choose }), el("span", {}, sign));
    }

    function fade() {
      view.opacity = slider.valueAsNumber / 100;
      draw();
    }

    function find(key) {
      return maps.find((map) => map.key === key);
    }

    function has(key) {
      return !panel.hidden && find(key) !== undefined;
    }

    /** The map that is to be seen now. */
    function current() {
      return [keys.preview, keys.chosen, keys.home].map(find).find(Boolean) ?? maps[0];
    }

    function take(key) {
      Object.assign(keys, { chosen: key, preview: null });
      refresh();
      const { title, addition } = current();
      spoken.textContent = `${title}. ${addition}`;
    }

    /** From outside, where the photo may be out of sight. */
    function choose(key) {
      take(key);
      photo.scrollIntoView({ block: "nearest" });
    }

    function preview(key) {
      if (keys.preview === key) return;
      keys.preview = key;
      if (!panel.hidden) draw();
    }

    function goHome(key) {
      Object.assign(keys, { home: key, chosen: null, preview: null });
      if (!panel.hidden) refresh();
    }

    /** After another choice, or other maps. */
    function refresh() {
      draw();
      replace(numbers, table(current()));
      choices.value = current().key;
      if (view.patch !== null) pick(view.patch);
      told(keys.chosen);
    }

    async function load(url) {
      image.src = url;
      await image.decode().catch(() => null); // what the browser cannot show, the service may still read, or refuse
      photo.hidden = image.naturalWidth === 0;
      const small = Math.min(image.naturalWidth, image.naturalHeight) < 100;
      image.classList.toggle("pixels", small);
      photo.style.setProperty("--ratio", String(image.naturalWidth / image.naturalHeight || 1));
      view.patch = null;
      readout.textContent = HELP;
      return !photo.hidden;
    }

    function show(asked, how, home = "") {
      explanation = asked;
      preprocessing = how;
      maps = Vitrine.maps.of(explanation);
      Object.assign(keys, { home, preview: null });
      if (explanation !== null && !find(keys.chosen)) keys.chosen = null;
      panel.hidden = map.hidden = maps.length === 0 || photo.hidden;
      spoken.textContent = "";
      if (panel.hidden) {
        replace(drawn);
        caption.hidden = true;
        photo.style.setProperty("--grey", "0");
        return false;
      }
      const [{ rows, columns }] = maps;
      map.setAttribute("aria-label", `Heat map of ${rows} by ${columns} patches: use the arrow keys to read them`);
      offer();
      refresh();
      return true;
    }

    /** All maps to choose from; those of one kind need no heading. */
    function offer() {
      const groups = [...new Set(maps.map(({ group }) => group))];
      const options = (group) =>
        maps.filter((one) => one.group === group).map(({ key, choice }) => el("option", { value: key }, choice));
      const grouped = groups.map((group) => el("optgroup", { label: group }, options(group)));
      choiceName.textContent = groups.length > 1 ? "Map " : "Layer ";
      choices.replaceChildren(...(groups.length > 1 ? grouped : options(groups[0])));
    }

    function draw() {
      const shown = current();
      drawMap();
      // So that the map's colours are seen, and not mistaken for the photo's.
      photo.style.setProperty("--grey", String(Math.min(1, 1.25 * view.opacity)));
      const captioned = find("sources") !== undefined;
      heading.textContent = captioned ? "The map on the photo" : shown.title;
      caption.hidden = !captioned;
      adds.hidden = captioned;
      replace(caption, el("b", {}, `${shown.title}.`), ` ${shown.addition}`);
      outliers.hidden = shown.outliers.length === 0;
      scale.hidden = shown.values.every((value) => value === 0);
      replace(scale, legend(shown, view));
      adds.textContent = shown.addition;
    }

    function drawMap() {
      const [width, height] = [image.naturalWidth, image.naturalHeight];
      const part = seen(width, height, preprocessing);
      replace(drawn, overlay(current(), view, { width, height, seen: part }));
      cut.hidden = part.width >= width && part.height >= height;
    }

    function step(event) {
      const { rows, columns } = current();
      const at = view.patch ?? 0;
      const [row, column] = [Math.floor(at / columns), at % columns];
      if (event.key === "Home") pick(row * columns);
      else if (event.key === "End") pick(row * columns + columns - 1);
      else if (event.key in STEPS) {
        const [down, right] = STEPS[event.key];
        pick(between(row + down, rows) * columns + between(column + right, columns));
      } else return;
      event.preventDefault();
    }

    function between(number, count) {
      return Math.min(count - 1, Math.max(0, number));
    }

    function point(event) {
      const { rows, columns } = current();
      const box = map.getBoundingClientRect();
      const part = seen(image.naturalWidth, image.naturalHeight, preprocessing);
      const x = ((event.clientX - box.left) / box.width) * image.naturalWidth - part.x;
      const y = ((event.clientY - box.top) / box.height) * image.naturalHeight - part.y;
      const [column, row] = [Math.floor((x / part.width) * columns), Math.floor((y / part.height) * rows)];
      if (row >= 0 && row < rows && column >= 0 && column < columns) pick(row * columns + column);
    }

    /** Mark a patch and say what the map has there. */
    function pick(index) {
      const shown = current();
      const { target, contrast } = explanation;
      view.patch = Math.min(index, shown.values.length - 1);
      drawMap();
      const [row, column] = [Math.floor(view.patch / shown.columns) + 1, (view.patch % shown.columns) + 1];
      const value = signed(shown.values[view.patch]);
      const rather = contrast === null ? "" : ` rather than ${contrast}`;
      const note = shown.outliers.includes(view.patch) ? "; an outlier, whose position means little" : "";
      readout.textContent = `Row ${row}, column ${column}: ${value} logits for ${target}${rather}${note}`;
    }

    function onChosen(listener) {
      told = listener;
    }

    /** To what is asked about, if it is out of sight. */
    function reveal() {
      if (!photo.hidden) photo.scrollIntoView({ block: "nearest" });
    }

    return { load, reveal, show, goHome, has, choose, chosen: () => keys.chosen, preview, onChosen };
  }

  Vitrine.photo = { create };
}
