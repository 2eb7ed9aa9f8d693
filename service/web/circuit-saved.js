"use strict";
/** The start of a saved circuit: the circuits, the photo and the cards are in the file itself. */
{
  const { circuits, image, cards, preprocessing } = JSON.parse(document.getElementById("data").textContent);
  Vitrine.circuitPage.create({
    circuits: circuits.map((one) => ({ dictionary: one.circuit.dictionary, get: async () => one })),
    image,
    preprocessing,
    card: async (layer, index, dictionary) => cards[`${dictionary}/${layer}/${index}`] ?? null,
  });
}
