"use strict";
/** What is asked, but not the picture, in the address's fragment: a link that sets the options where it is opened. */
{
  const FIELDS = ["labels", "label_set", "scoring", "threshold", "edit", "target", "contrast"];

  /** Put a request into the address. @param {Object} request the API's AttributeRequest */
  function write({ labels, explain = {}, ...named }) {
    const asked = { ...named, labels: labels && Vitrine.labels.format(labels), target: explain.targets?.[0] };
    const all = { ...asked, contrast: explain.contrast };
    const given = FIELDS.filter((name) => all[name] !== undefined).map((name) => [name, all[name]]);
    const fragment = given.length ? `#${new URLSearchParams(given)}` : location.pathname + location.search;
    history.replaceState(null, "", fragment);
  }

  /** @returns {?Object} its fields as texts; null: the address says nothing of them */
  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    const found = FIELDS.filter((name) => given.has(name)).map((name) => [name, given.get(name)]);
    return found.length ? Object.fromEntries(found) : null;
  }

  Vitrine.link = { write, read };
}
