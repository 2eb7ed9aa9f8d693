"use strict";
/** The page: from a picture and labels to an answer on the screen. The newest request counts. */
{
  const { el, replace } = Vitrine.dom;
  const { api } = Vitrine;
  const at = (id) => document.getElementById(id);

  const photo = Vitrine.photo.create(at("frame"), at("map"));
  const labels = Vitrine.labels.create(at("labels-form"), () => ask(chosen));
  const options = Vitrine.options.create(at("labels-form"));
  const cards = Vitrine.cards.create({
    card: (layer, index, dictionary) => api.get(`v1/features/${layer}/${index}?dictionary=${dictionary}`),
    search: (label, next, dictionary) =>
      api.get(next?.replace(/^\//, "") ?? `v1/features?dictionary=${dictionary}&label=${encodeURIComponent(label)}`),
    hasCard,
  });
  const names = ["predictions", "account", "trust", "timings"];
  const answers = Vitrine.answer.create(Object.fromEntries(names.map((name) => [name, at(name)])), photo, {
    preprocessing: () => model?.manifest.preprocessing ?? null,
    onCard: cards.open,
    hasCard,
    count: () => shown.listed.length,
    offer: (row) => switches.offer(row),
    onExplain: (_, label) => () => ask({ ...chosen, target: label }),
  });
  const switches = Vitrine.switches.create(
    (off) => Vitrine.without.create(off, at("without"), at("compared"), intervene),
    refused,
  );

  let model = null; // the API's ModelResponse
  let chosen = { picture: null, target: null, contrast: null }; // what was asked last; target null: the top-1
  let loaded = null; // the picture whose photo is on the screen
  let shown = null; // the answer that is on the screen: {found, wanted, request, listed}
  let question = null; // of the answer that is shown, for what else is asked about it
  let running = null; // AbortController of the running request

  document.body.append(Vitrine.waterfall.hatching());
  Vitrine.picking.listen(
    { file: at("file"), choosers: [at("choose"), at("choose-other")], examples: at("examples") },
    (blob, name, mine) => ask({ picture: { blob, name, mine }, target: null, contrast: null }),
    complain,
  );
  at("key-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    api.setKey(at("key").value);
    at("key-form").hidden = true;
    await start();
    if (model !== null && chosen.picture !== null) ask(chosen);
  });
  at("contrast").addEventListener("change", (event) => ask({ ...chosen, contrast: event.target.value || null }));
  at("similar-ask").addEventListener("click", () => {
    const draw = async (answer) => {
      await import("./similar.js");
      return Vitrine.similar.draw(answer);
    };
    more("similar", "v1/similar", { limit: 5 }, draw);
  });
  at("residual-ask").addEventListener("click", () => {
    const request = { explain: { residual: true, features: 4 } };
    const draw = ({ residual }) => Vitrine.residual.draw(residual, { onCard: cards.open, hasCard });
    more("residual", "v1/attribute", request, draw);
  });
  at("circuit-ask").addEventListener("click", () => {
    const opened = Vitrine.circuitAsk.open(question);
    replace(at("circuit-error"), opened ? [] : "The browser did not open the window: allow pop-ups for this page.");
  });
  const narrow = matchMedia("not all and (min-width: 60rem)");
  narrow.addEventListener("change", place);
  window.addEventListener("hashchange", () => {
    if (model !== null && Vitrine.link.read() !== null) follow();
  });
  start();

  async function start() {
    try {
      await know();
      complain("");
      follow();
    } catch (error) {
      refused(error, start);
    }
  }

  /** Set what the address says, and ask again. */
  async function follow() {
    const asked = Vitrine.link.read();
    if (asked === null) return;
    const lacking = [...labels.set(asked), ...options.set(asked)];
    await ask({ ...chosen, target: asked.target ?? null, contrast: asked.contrast ?? null });
    if (lacking.length) complain(`The link names what this service does not have: ${lacking.join(", ")}.`);
  }

  function hasCard(layer, index, dictionary = "clt") {
    return model.card_dictionaries.includes(dictionary);
  }

  /** On a narrow screen the labels stand after an account, which they would keep out of sight. */
  function place() {
    const column = narrow.matches && shown !== null ? at("main") : document.querySelector(".ask-column");
    if (at("labels-section").parentElement !== column) column.append(at("labels-section"));
  }

  /** The bundle in service, its label sets and edits: before any picture, and again where an answer is another one's. */
  async function know() {
    const [served, { label_sets: sets }] = await Promise.all([api.get("v1/model"), api.get("v1/labels")]);
    model = served;
    const { name, precision, default_edit: edit } = model;
    at("model").textContent = [name, precision, ...(edit ? [`edit ${edit}`] : [])].join(" · ");
    labels.offer(sets);
    options.offer(model);
  }

  /** Ask about a picture; of a newer request this one's answer is not waited for. */
  async function ask(wanted) {
    running?.abort();
    chosen = wanted;
    const { picture } = wanted;
    if (picture === null) return;
    const mine = new AbortController();
    running = mine;
    busy(true, "Waiting for the answer …");
    try {
      if (model === null) await know();
      if (picture !== loaded) await load(picture);
      const { found, request, listed } = await send(wanted, mine.signal);
      performance.mark("vitrine:answer");
      if (found.answer.model.digest !== model.digest) await know(); // a new bundle is in service
      if (mine !== running) return;
      const before = shown;
      show({ found, wanted, request, listed });
      reveal(before);
    } catch (error) {
      if (mine !== running) return;
      const kept = shown !== null && picture !== shown.wanted.picture && error.name !== "AbortError";
      if (kept) await restore(mine);
      if (mine === running) refused(error, () => ask(wanted), kept ? shown.wanted.picture.name : null);
    }
  }

  /** The last answer again, with its photo: another picture has none. */
  async function restore(mine) {
    chosen = shown.wanted;
    await load(chosen.picture);
    if (mine === running) show(shown);
  }

  /** Bring what is new into sight: the photo, the predictions, or, where those stayed, the account. */
  function reveal(before) {
    const asked = ({ request: { explain: _, ...named } }) => JSON.stringify(named);
    if (before?.wanted.picture !== shown.wanted.picture) photo.reveal();
    else if (asked(before) !== asked(shown)) {
      at("predictions").querySelector(".predictions").scrollIntoView({ block: "nearest" });
      if (document.activeElement?.type === "submit") at("predictions").focus({ preventScroll: true });
    } else {
      const { top } = at("why").getBoundingClientRect();
      if (top < 0 || top > 0.75 * innerHeight) at("why").scrollIntoView();
    }
  }

  /** Whether another label fits better than those that the user named, by the bundle's own. */
  async function fit({ answer }, { picture }, { labels: named, label_set: set, edit }) {
    if (!named && !set) return;
    const mine = running;
    const own = (picture.own ??= new Map()); // promises of answers
    const key = `${answer.model.digest} ${edit}`;
    try {
      const count = labels.size("default");
      const asked = { top_k: count, ...(edit && { edit }) };
      const call = () => api.post("v1/classify", picture.blob, picture.name, asked, { signal: mine.signal });
      if (!own.has(key)) own.set(key, call());
      const found = (await own.get(key)).answer;
      await import("./fit.js");
      if (mine !== running) return;
      const onOwn = () => {
        labels.set({});
        ask({ ...chosen, target: null, contrast: null });
      };
      at("predictions").append(Vitrine.fit.draw(answer.predictions, found.predictions, onOwn) ?? "");
    } catch (error) {
      own.delete(key);
      if (!(error instanceof api.CallError) && error.name !== "AbortError") throw error; // else there is no hint
    }
  }

  /** The answer, its request and labels: of a second request, if the first asked for what a new bundle cannot give. */
  async function send(wanted, signal) {
    const { blob, name } = wanted.picture;
    const options = { signal, onWait: (sentence) => busy(true, sentence) };
    const answered = async () => {
      const request = asked(wanted);
      const listed = labels.listed();
      return { found: await api.post("v1/attribute", blob, name, request, options), request, listed };
    };
    try {
      return await answered();
    } catch (error) {
      if (!["invalid_request", "unknown_edit", "unknown_label_set"].includes(error.code)) throw error;
      const { digest, default_edit: edit } = model;
      await know();
      if (model.digest === digest && model.default_edit === edit) throw error;
      return answered();
    }
  }

  /** The photo at once, before its answer: the old answer is not about it. */
  async function load(picture) {
    photo.show(null, null);
    at("answer").hidden = at("predictions").hidden = true;
    loaded = picture;
    picture.url ??= URL.createObjectURL(await Vitrine.still(picture.blob));
    const visible = await photo.load(picture.url);
    at("welcome").hidden = at("drop").hidden = at("no-photo").hidden = visible;
    at("another").hidden = !visible;
  }

  /** The request's JSON. A target and a contrast last as long as they are among the labels. */
  function asked({ target, contrast }) {
    const named = labels.request();
    if (named === null) throw new api.CallError("Enter at least one label, or choose a label set.", "no_labels");
    const compared = { ...named, ...options.request() };
    const known = (label) => label !== null && labels.listed().includes(label);
    const explain = {};
    if (!options.edited()) {
      // of an edited network there is the ledger alone
      if (model.manifest.files["attention.npy"]) explain.heatmap = true;
      const baseline = model.source_baselines.at(-1); // the average picture, where the bundle has one
      if (baseline) Object.assign(explain, { sources: true, baseline });
    }
    if (known(target)) explain.targets = [target];
    if (known(contrast) && contrast !== target) explain.contrast = contrast;
    return Object.keys(explain).length ? { ...compared, explain } : compared;
  }

  function show(answered) {
    const { found, wanted, request } = answered;
    const { answer, text, ms } = found;
    const { picture } = wanted;
    const [explanation] = answer.explanations;
    if (shown && shown.wanted.picture !== picture) URL.revokeObjectURL(shown.wanted.picture.url);
    shown = answered;
    place();
    at("answer").hidden = at("predictions").hidden = false;
    at("welcome").hidden = true;
    switches.start(answer.edit?.applied ? [] : model.interventions, question?.picture !== picture.blob);
    answers.show(answer, explanation, ms);
    offerContrasts(explanation);
    Vitrine.save.forget();
    const linkable = Vitrine.link.write(request);
    const url = new URL("v1/attribute", document.baseURI).href;
    const line = Vitrine.reproduce.curl({ url, file: picture.name, request, withKey: api.key() !== null });
    const saved = picture.mine ? null : Vitrine.save.file(picture.blob, picture.name, `Save ${picture.name}`);
    const linked = linkable
      ? el("a", { class: "button", href: location.href }, "Link to these options, without the picture")
      : el("span", { class: "note" }, "The labels are too long for a link.");
    replace(
      at("take"),
      el("p", { class: "buttons" }, Vitrine.save.json(text, picture.name), saved, linked),
      el("p", {}, "The same request from a shell in the photo's folder:"),
      Vitrine.reproduce.line(line),
      el("p", { class: "note" }, `Model ${Vitrine.answer.origin(answer)}. Request ${answer.request_id}.`),
    );
    replace(at("similar"));
    replace(at("residual"));
    const { labels: own, label_set: set } = request; // scoring and edits are of the account alone
    const { target, contrast } = explanation;
    const same = { labels: own, label_set: set, target, contrast };
    question = { picture: picture.blob, name: picture.name, request: same, key: api.key() };
    const offered = Vitrine.lacks.of(model);
    const edited = answer.edit !== null; // of an edited network there is the ledger alone
    at("circuit").hidden = edited || !offered.circuit;
    at("stream").hidden = edited || !offered.stream;
    at("similar-section").hidden = !offered.similar;
    at("lacks").textContent = offered.sentence;
    at("circuit-target").textContent = contrast === null ? target : `${target} rather than ${contrast}`;
    replace(at("circuit-error"));
    complain("");
    busy(false, Vitrine.answer.spoken(answer));
    requestAnimationFrame(() => setTimeout(() => performance.measure("vitrine:account", "vitrine:answer")));
    fit(found, wanted, request);
  }

  /** What the answer that is shown would be with these edits: the API's InterveneResponse. */
  async function intervene(edits) {
    const { picture, name, request } = question;
    const { target, contrast, ...named } = request;
    const mine = running;
    busy(true, "Waiting for the answer …");
    try {
      const asked = { ...named, ...edits, explain: { targets: [target], contrast } };
      return (await api.post("v1/intervene", picture, name, asked, { signal: mine.signal })).answer;
    } finally {
      if (mine === running) busy(false, "");
    }
  }

  /** Every other label may be what the explained one is compared with; the likeliest stand first. */
  function offerContrasts({ target, contrast }) {
    const others = shown.listed.filter((label) => label !== target);
    const option = (label) => el("option", { value: label }, label);
    at("contrast").replaceChildren(el("option", { value: "" }, "nothing: only its logit"), ...others.map(option));
    at("contrast").value = contrast ?? "";
  }

  /** What else is asked of the picture: its answer, drawn where `id` is. */
  async function more(id, path, request, draw) {
    const { picture } = chosen;
    const signal = running?.signal;
    replace(at(id), el("p", { role: "status" }, "Waiting for the answer …"));
    try {
      const { answer } = await api.post(path, picture.blob, picture.name, request, { signal });
      replace(at(id), await draw(answer));
    } catch (error) {
      if (error.name === "AbortError") return;
      replace(at(id), el("p", { role: "alert", class: "error" }, error.message));
    }
  }

  /** again: asks the same; kept: the name of the picture whose answer is still on the screen. */
  function refused(error, again, kept = null) {
    if (error.name === "AbortError") return;
    if (!(error instanceof api.CallError)) console.error(error);
    busy(false, "");
    complain(error.message, error.requestId, error.passing ? again : null, kept);
    if (error.code !== "unauthorized") return;
    at("key-form").hidden = false;
    at("key").focus();
  }

  function complain(sentence, requestId = null, again = null, kept = null) {
    const id = requestId ? el("span", { class: "note" }, ` Request ${requestId}.`) : null;
    const still = kept ? el("p", {}, `The answer below is still about ${kept}.`) : null;
    const retry = again ? el("p", {}, el("button", { type: "button", onclick: () => again() }, "Try again")) : null;
    replace(at("error"), sentence ? [el("span", {}, sentence), id, still, retry] : []);
  }

  function busy(working, sentence) {
    at("main").setAttribute("aria-busy", String(working));
    at("status").textContent = sentence;
    at("progress").textContent = working ? sentence : "";
  }
}
