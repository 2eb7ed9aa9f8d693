"use strict";
/** How labels are compared, and by which network: the scoring with its threshold, and the edit. */
{
  const { el } = Vitrine.dom;

  /**
   * @param {HTMLFormElement} form with fields scoring, threshold and edit
   * @returns {Object}
   *   offer(model): the API's ModelResponse, which names the edits;
   *   set(asked): of `Vitrine.link`; returns what of it there is not, in words;
   *   request(): the part of a request that says so. Throws `CallError` without a threshold;
   *   edited(): whether the network that is asked is an edited one
   */
  function create(form) {
    const [scoring, threshold, edit] = ["scoring", "threshold", "edit"].map((name) => form.elements.namedItem(name));
    let usual = null; // the service's own edit
    scoring.addEventListener("change", settle);
    settle();

    function settle() {
      threshold.required = scoring.value === "independent";
      threshold.closest("p").hidden = !threshold.required;
    }

    function offer({ edits, default_edit: own }) {
      usual = own;
      const others = edits.filter(({ name, problem }) => problem === null && name !== own);
      const named = others.map(({ name }) => [name, name]);
      const none = [own ? "none" : "", "none: the unmodified CLIP"];
      const before = edit.value;
      const all = own ? [["", `${own}: the service's default`], none, ...named] : [none, ...named];
      edit.replaceChildren(...all.map(([value, text]) => el("option", { value }, text)));
      edit.value = all.some(([value]) => value === before) ? before : "";
      edit.closest("p").hidden = all.length < 2;
    }

    function set(asked) {
      scoring.value = asked.scoring === "independent" ? "independent" : "softmax";
      threshold.value = asked.threshold ?? "";
      edit.value = asked.edit === usual ? "" : (asked.edit ?? "");
      settle();
      if (edit.selectedIndex >= 0) return [];
      edit.value = "";
      return [`edit “${asked.edit}”`];
    }

    function request() {
      const of = edit.value ? { edit: edit.value } : {};
      if (scoring.value === "softmax") return of;
      if (threshold.value === "" || !threshold.validity.valid) {
        const message = "Enter a threshold from −1 to 1: the minimum cosine of a label.";
        throw new Vitrine.api.CallError(message, "no_threshold");
      }
      return { ...of, scoring: "independent", threshold: threshold.valueAsNumber };
    }

    function edited() {
      return (edit.value || (usual ?? "none")) !== "none";
    }

    return { offer, set, request, edited };
  }

  Vitrine.options = { create };
}
