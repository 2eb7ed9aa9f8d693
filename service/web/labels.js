"use strict";
/** The labels that are asked about: a named set, or what stands in the field. */
{
  const { el } = Vitrine.dom;
  const OWN = "";

  /**
   * Labels in a text, separated by commas or new lines; one in double quotes may hold either. Each counts once.
   * @param {string} text
   * @returns {string[]}
   */
  function parse(text) {
    const found = text.matchAll(/\s*(?:"((?:[^"]|"")*)"[^,\n]*|([^,\n]*))(?:[,\n]|$)/g);
    const labels = Array.from(found, ([, quoted, bare]) => (quoted?.replaceAll('""', '"') ?? bare).trim());
    return [...new Set(labels.filter(Boolean))];
  }

  /** @param {string[]} labels @returns {string} a text that `parse` reads back */
  function format(labels) {
    return labels.map((label) => (/[",\n]/.test(label) ? `"${label.replaceAll('"', '""')}"` : label)).join(", ");
  }

  /**
   * @param {HTMLFormElement} form
   * @param {function()} onAsk told when it is to be asked again
   * @returns {{offer: function(Object[]), set: function(Object): string[], request: function(): ?Object,
   *   listed: function(): string[], size: function(string): number}}
   *   offer: the API's label sets, of which the chosen one stays if it is there; set: what `Vitrine.link` says, it returns what of it there is not, in words;
   *   request: the part of a request that names the labels, null if there are none; listed: the labels themselves;
   *   size: how many a set has, by its name
   */
  function create(form, onAsk) {
    const [select, text] = [form.elements.namedItem("set"), form.elements.namedItem("labels")];
    let sets = [];

    select.addEventListener("change", () => {
      if (select.value !== OWN) text.value = format(chosen().labels);
      onAsk();
    });
    text.addEventListener("input", () => {
      select.value = OWN;
    });
    text.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) form.requestSubmit();
    });
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      onAsk();
    });

    function chosen() {
      return sets.find(({ name }) => name === select.value);
    }

    function offer(given) {
      const before = sets.length ? select.value : "default";
      sets = given;
      const each = sets.map(({ name, labels }) => el("option", { value: name }, `${setName(name)} (${labels.length})`));
      select.replaceChildren(...each, el("option", { value: OWN }, "your own, below"));
      select.value = before === OWN || sets.some(({ name }) => name === before) ? before : "default";
      if (select.value !== OWN) text.value = format(chosen().labels);
    }

    function set({ labels, label_set: name = "default" }) {
      const known = labels !== undefined || sets.some((one) => one.name === name);
      select.value = labels !== undefined ? OWN : known ? name : "default";
      text.value = labels ?? format(chosen().labels);
      return known ? [] : [`label set “${name}”`];
    }

    function setName(name) {
      return name === "default" ? "the bundle's own" : name;
    }

    function request() {
      const set = chosen();
      if (set) return set.name === "default" ? {} : { label_set: set.name };
      if (sets.length === 0) return {};
      const labels = listed();
      return labels.length ? { labels } : null;
    }

    function listed() {
      return chosen()?.labels ?? parse(text.value);
    }

    /** How many labels a set has. */
    function size(name) {
      return sets.find((one) => one.name === name).labels.length;
    }

    return { offer, set, request, listed, size };
  }

  Vitrine.labels = { create, parse, format };
}
