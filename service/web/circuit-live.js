"use strict";
/** The start of the circuit page: the question comes from the window that opened it, the circuits from the service. */
{
  const { api, circuitGroups, circuitPage } = Vitrine;
  const DRAWN = 60; // groups
  const WAIT_MS = 5000; // for the question

  start();

  async function start() {
    try {
      const { picture, name, request, key } = await question();
      if (key !== null) api.setKey(key);
      const model = await api.get("v1/model");
      circuitPage.create({
        circuits: model.circuit_dictionaries.map((dictionary) => ({
          dictionary,
          get: once(() => circuit(picture, name, { ...request, dictionary })),
        })),
        image: URL.createObjectURL(await Vitrine.still(picture)),
        preprocessing: model.manifest.preprocessing,
        card: async (layer, index, dictionary) =>
          model.card_dictionaries.includes(dictionary)
            ? api.get(`v1/features/${layer}/${index}?dictionary=${dictionary}`)
            : null,
      });
    } catch (error) {
      circuitPage.fail(error.message, () => location.reload());
    }
  }

  /** What to ask. Rejects where nobody says it: the page was opened by itself, or the other one is gone. */
  function question() {
    return new Promise((resolve, reject) => {
      const gone = "The photo is no longer available: send it again on the main page and open its circuit from there.";
      const fail = () => reject(new Error(gone));
      addEventListener("message", ({ source, origin, data }) => {
        if (source === opener && origin === location.origin) resolve(data);
      });
      if (opener === null) fail();
      else opener.postMessage("question", location.origin);
      setTimeout(fail, WAIT_MS);
    });
  }

  async function circuit(picture, name, request) {
    const { answer } = await api.post("v1/circuit", picture, name, request);
    const found = circuitGroups.grouped(answer);
    const rather = found.contrast === null ? "" : ` rather than ${found.contrast}`;
    return {
      circuit: circuitGroups.mostInfluential(found, DRAWN),
      title: `What made ${answer.target}${rather}`,
      all: found.groups.length,
    };
  }

  /** What a call gave, from then on without another; a failed one is tried again. */
  function once(call) {
    let found = null;
    return async () => {
      found ??= await call();
      return found;
    };
  }
}
