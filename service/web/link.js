"use strict";
/** What is asked, but not the picture, in the address's fragment: a link that sets the options where it is opened. */
{
  const FIELDS = ["labels", "label_set", "scoring", "threshold", "edit", "target", "contrast"];

  const LONGEST = 8000; // characters that programs pass on without cutting them

  /**
   * Put a request into the address.
   * @param {Object} request the API's AttributeRequest
   * @returns {boolean} false: it is too long, and the address says nothing of it
   */
  function write({ labels, explain = {}, ...named }) {
    const asked = { ...named, labels: labels && Vitrine.labels.format(labels), target: explain.targets?.[0] };
    const all = { ...asked, contrast: explain.contrast };
    const given = FIELDS.filter((name) => all[name] !== undefined).map((name) => [name, all[name]]);
    const fragment = `#${new URLSearchParams(given)}`;
    const fits = fragment.length <= LONGEST;
    history.replaceState(null, "", given.length && fits ? fragment : location.pathname + location.search);
    return fits;
  }

  /** @returns {?Object} its fields as texts; null: the address says nothing of them */
  function read() {
    const given = new URLSearchParams(location.hash.slice(1));
    const found = FIELDS.filter((name) => given.has(name)).map((name) => [name, given.get(name)]);
    return found.length ? Object.fromEntries(found) : null;
  }

  Vitrine.link = { write, read };
}
