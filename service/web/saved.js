"use strict";
/** The start of a saved account: the answer, its photo and the cards are in the file itself. */
{
  const at = (id) => document.getElementById(id);
  const { answer, image, cards, preprocessing } = JSON.parse(at("data").textContent);
  const photo = Vitrine.photo.create(at("frame"), at("map"));
  const key = (layer, index, dictionary = "clt") => `${dictionary}/${layer}/${index}`;
  const hasCard = (...feature) => key(...feature) in cards;
  const dialog = Vitrine.cards.create({
    card: async (...feature) => cards[key(...feature)],
    search: null, // among all features of a bundle, which only the service has
    hasCard,
  });
  const names = ["predictions", "account", "trust", "timings"];
  const answers = Vitrine.answer.create(Object.fromEntries(names.map((name) => [name, at(name)])), photo, {
    preprocessing: () => preprocessing,
    onCard: dialog.open,
    hasCard,
    onExplain: (_, label) => {
      const explanation = answer.explanations.find(({ target }) => target === label);
      return explanation ? () => answers.show(answer, explanation) : null;
    },
  });
  document.body.append(Vitrine.waterfall.hatching());
  at("origin").textContent = Vitrine.answer.origin(answer);
  at("stream").hidden = answer.residual === null;
  const known = { onCard: dialog.open, hasCard };
  if (answer.residual) at("residual").append(...Vitrine.residual.draw(answer.residual, known));
  at("take").append(Vitrine.save.json(JSON.stringify(answer, null, 2), "answer"));
  photo.load(image).then(() => answers.show(answer));
}
