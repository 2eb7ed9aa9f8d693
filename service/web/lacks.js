"use strict";
/** What the bundle in service has and what it lacks: nothing is offered that it cannot give. */
{
  /**
   * @param {Object} model the API's ModelResponse
   * @returns {{similar: boolean, circuit: boolean, stream: boolean, sentence: string}} sentence: what it lacks, "" if
   *   nothing
   */
  function of(model) {
    const { manifest, card_dictionaries: cards, circuit_dictionaries: circuits, interventions } = model;
    const features = manifest.shape.features > 0;
    const similar = cards.includes("clt") && manifest.cards?.references > 0;
    const lacks = [
      !features && "features (it has no CLT, and therefore no cards, similar images or circuits of features)",
      features && !cards.includes("clt") && "cards of its features (the command “vitrine cards” makes them)",
      features && !similar && "reference images for finding similar ones",
      features && !circuits.includes("clt") && "circuits",
      !circuits.includes("residual") && "features of the stream (residual SAEs)",
      !model.source_baselines.length && "source accounts",
      !manifest.files["attention.npy"] && "heat maps",
      !interventions.length && "rows that can be switched off",
      interventions.length > 0 && !interventions.includes("rerun") && "reruns of the network without a row",
      !model.edits.length && "edits",
    ].filter(Boolean);
    const sentence = lacks.length ? `Not offered, because this bundle does not have: ${lacks.join("; ")}.` : "";
    return { similar, circuit: circuits.length > 0, stream: circuits.includes("residual"), sentence };
  }

  Vitrine.lacks = { of };
}
