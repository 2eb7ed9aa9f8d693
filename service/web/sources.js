"use strict";
/** The source account: the logit followed back to the features that made it, of all layers and over all tokens. */
{
  const { el, signed, plain, tiny, percent, sum } = Vitrine.dom;
  const { running, scale } = Vitrine.waterfall;
  const { figure, equation, body, group, line, fold, feature, glossary } = Vitrine.accountTable;

  const MORE = ["Running total", "From the class token", "From patches"];
  const NAMES = {
    others: "All other features",
    error: "Errors",
    mlps: "MLPs",
    embedding: "Embeddings",
    bias: "Decoder biases",
    constants: "Constants",
    baseline: "Average picture",
    silent: "Silent here",
    remainder: "Remainder",
  };
  const MEANING = {
    Features: "What a feature wrote at all tokens where it fires, as far as attention carried it to this logit.",
    Errors: "What the MLPs wrote, at any token, that no feature explains. It has its own row and is never spread over others.",
    Embeddings: "The class token and the patches as they enter the first layer: colours, edges and positions.",
    "Decoder biases": "What the transcoder adds to each layer, regardless of which features fire.",
    Constants: "What attention and the last normalisation add, regardless of the picture.",
    Remainder: "Rounding: the logit minus the sum of all rows.",
  };
  /** Of a bundle without a CLT: what the MLPs wrote is one row, of which no part is a feature's or an error. */
  const OF_MLPS = {
    MLPs: "What the MLPs of all layers wrote, at any token. This bundle has no features that could split it.",
  };
  const OF_AVERAGE = {
    "Average picture": "What the features contribute in the average picture. The feature rows above are relative to it.",
    "Silent here": "What is missing from this picture: features that fire in the average picture but not here.",
  };

  /**
   * @param {Object} explanation the API's Explanation, with `sources`
   * @param {Object} options of `Vitrine.accountTable`
   * @returns {HTMLElement[]}
   */
  function draw(explanation, options) {
    const account = explanation.sources;
    const about = account.layers.some(({ baseline }) => baseline !== null);
    if (explanation.ledger.clt.length === 0) return drawMlps(explanation, options);
    const all = rows(account, about);
    const value = (kind) => all.find((row) => row.kind === kind).value;
    const named = ["error", "embedding", "bias", "constants", ...(about ? ["baseline", "silent"] : [])];
    const short = { bias: "biases", silent: "silent" };
    const terms = named.map((kind) => [short[kind] ?? NAMES[kind].toLowerCase(), value(kind)]);
    const features = sum(account.layers.map((layer) => layer.features));
    return [
      el("p", { class: "note" }, introduction(about)),
      equation(explanation, account.logit, [["features", features], ...terms]),
      table(explanation, all, options),
      el("p", { class: "note" }, trust(explanation)),
      glossary(about ? { ...MEANING, ...OF_AVERAGE } : MEANING),
    ];
  }

  /** The account of a bundle without a CLT: by MLP, embeddings and constants. */
  function drawMlps(explanation, options) {
    const account = explanation.sources;
    const kinds = ["error", "embedding", "constants", "remainder"];
    const all = rows(account, false).filter(({ kind }) => kinds.includes(kind));
    for (const row of all) if (row.kind === "error") row.kind = "mlps";
    const { Embeddings, Constants, Remainder } = MEANING;
    return [
      el("p", { class: "note" }, "The logit, followed back through attention to what the MLPs and the patches wrote."),
      equation(explanation, account.logit, ["MLPs", "embeddings", "constants"].map((name, at) => [name, all[at].value])),
      table(explanation, all, options),
      glossary({ ...OF_MLPS, Embeddings, Constants, Remainder }),
    ];
  }

  function introduction(about) {
    const from = about
      ? " Each is relative to its mean over many pictures: what this picture has and the average one does not."
      : "";
    return `The logit, followed back through attention to the features that contributed to it, largest first.${from}`;
  }

  /** The errors' share; and the logit, where the prediction was made in another precision. */
  function trust({ logit, sources }) {
    const errors = `Errors are ${percent(sources.error_share)} of this account, with all rows counted without their signs.`;
    if (Math.abs(sources.logit - logit) < 0.0005) return errors;
    return `${errors} The account was computed in float32 and the prediction was not: its logit is ${plain(logit)}.`;
  }

  /** The account's rows in order; `parts` are what a row opens into. They add up to the logit. */
  function rows({ features, layers, embedding, constants, remainder }, about) {
    const listed = (layer) => sum(features.filter((one) => one.layer === layer).map((one) => one.contribution));
    const by = (of) => layers.map((layer) => ({ name: `Layer ${layer.layer}`, value: of(layer) }));
    const whole = (kind, parts) => ({ kind, parts, value: sum(parts.map((part) => part.value)) });
    const [token, ...patches] = embedding;
    return running(
      [
        ...features.map((found) => ({ kind: "source", feature: found, value: found.contribution })),
        whole("others", by((layer) => layer.features - listed(layer.layer))),
        whole("error", by((layer) => layer.error)),
        whole("embedding", [
          { name: "Class token", value: token },
          { name: "Patches", value: sum(patches) },
        ]),
        whole("bias", by((layer) => layer.bias)),
        { kind: "constants", value: constants },
        ...(about ? ["baseline", "silent"] : []).map((kind) => whole(kind, by((layer) => layer[kind]))),
        { kind: "remainder", value: remainder },
      ],
      0,
    ).map((row) => ({ ...row, parts: row.parts && running(row.parts, row.start) }));
  }

  function table(explanation, all, options) {
    const features = all.filter(({ kind }) => kind === "source");
    const axis = scale([...all, ...all.flatMap(({ parts }) => parts ?? [])]);
    const plainLine = (row, name, text) => line(row, name, axis, ["", ""], { text });

    function folded(row) {
      const lines = row.parts.map((part) => plainLine({ ...part, kind: "part" }, part.name));
      const more = row.kind === "embedding" ? "by token" : "by layer";
      const what = { name: NAMES[row.kind], more, key: row.kind, lines };
      return fold((name) => plainLine(row, name), what, options.state.open);
    }

    function other(row) {
      if (row.parts) return folded(row);
      const text = row.kind === "remainder" ? tiny(row.value) : undefined;
      return body([plainLine(row, NAMES[row.kind], text)]);
    }

    const bodies = [
      features.length > 0 && group("Features, largest first", features, axis, MORE.length),
      el("tbody", { class: "features" }, features.map((row) => featureLine(row, axis, options))),
      all.filter(({ kind }) => kind !== "source").map(other),
    ];
    const { target, contrast, sources } = explanation;
    const rather = contrast === null ? "" : ` rather than ${contrast}`;
    const made = explanation.ledger.clt.length ? "features of all layers" : "MLPs and patches";
    const what = `the ${made} that contributed to it, in logits. The rows add up to the last row.`;
    const caption = `Why ${target}${rather}: ${what}`;
    return figure(explanation, { caption, axis, more: MORE, bodies, logit: sources.logit }, options);
  }

  /** A feature; while it is pointed at or has the focus, what it saw is drawn on the photo. */
  function featureLine(row, axis, options) {
    const { layer, index, label, tokens } = row.feature;
    const { maps } = options;
    const key = `${layer}/${index}`;
    const drawn = maps?.has(key) ?? false;
    const mouse = (shown) => (event) => event.pointerType === "mouse" && maps.preview(shown);
    const attributes = {
      "data-row": `source.${key}`,
      onpointerenter: drawn && mouse(key),
      onpointerleave: drawn && mouse(null),
      onfocusin: drawn && (() => maps.preview(key)),
      onfocusout: drawn && (() => maps.preview(null)),
    };
    const press = {
      type: "button",
      class: "where-button",
      "data-key": `where ${key}`,
      "data-map": key,
      "aria-pressed": String(maps?.chosen() === key),
      "aria-label": `Show on the photo where ${label ?? ""} #${index} of layer ${layer} contributed`.replace("  ", " "),
      title: "Show on the photo where it contributed",
      onclick: () => maps.choose(maps.chosen() === key ? null : key),
    };
    const name = el("div", {}, feature(row.feature, layer, options, [`layer ${layer}`]));
    const cell = el("div", { class: "source-name" }, drawn && el("button", press, "◎"), name);
    const [token, ...patches] = tokens;
    return line(row, cell, axis, [signed(token), signed(sum(patches))], { attributes, offer: options.offer });
  }

  Vitrine.sources = { draw };
}
