"use strict";
/** The maps that can be laid over the photo: where it came from, what each feature saw, where attention read. */
{
  const { signed, sum } = Vitrine.dom;

  /**
   * @typedef {Object} PhotoMap
   * @property {string} key sources; LAYER/INDEX of a feature; "" for attention of all layers, or a layer's number
   * @property {string} group of its choice
   * @property {string} choice its name there
   * @property {string} title what it shows
   * @property {number[]} values in logits a patch
   * @property {number} least what is drawn in full is at least this
   * @property {number} rows
   * @property {number} columns
   * @property {number[]} outliers patches whose place means little
   * @property {string} addition how it adds up, in words
   */

  /** @param {?Object} explanation the API's @returns {PhotoMap[]} those that there are */
  function of(explanation) {
    if (explanation === null) return [];
    return [...sources(explanation), ...attention(explanation)];
  }

  function sources({ sources: account, heatmap }) {
    if (!account) return [];
    const { rows, columns, logit } = account;
    const common = { rows, columns, outliers: heatmap?.outliers ?? [], least: 0 };
    const [token, ...patches] = account.map;
    const rest = logit - token - sum(patches);
    const all = {
      key: "sources",
      group: "Where it came from",
      choice: "all contributions",
      title: "Where it came from",
      values: patches,
      addition:
        `Features, errors and embeddings: patches ${signed(sum(patches))}, class token ${signed(token)}. ` +
        `The other rows, ${signed(rest)}, have no place in the photo.`,
    };
    return [{ ...common, ...all }, ...account.features.map((feature) => ({ ...common, ...saw(feature) }))];
  }

  function saw({ layer, index, label, tokens }) {
    const [token, ...values] = tokens;
    const name = label === null ? `#${index}` : `${label} #${index}`;
    const choice = `${name}, layer ${layer}`;
    return {
      key: `${layer}/${index}`,
      group: "Where a feature contributed",
      choice,
      title: `Where ${choice} contributed`,
      values,
      least: Math.abs(token) / 10, // beside a large part at the class token, next to nothing must not look like much
      addition: said(token, values),
    };
  }

  function said(token, values) {
    if (values.every((value) => value === 0)) {
      return `It contributes only at the class token, which has no place in the photo: ${signed(token)}.`;
    }
    const parts = `Patches ${signed(sum(values))}, class token, which has no place in the photo, ${signed(token)}`;
    return `${parts}: together ${signed(token + sum(values))}.`;
  }

  function attention({ heatmap, ledger, sources: account }) {
    if (!heatmap) return [];
    const { rows, columns, outliers } = heatmap;
    const common = { group: "Where attention read", title: "Where attention read", least: 0, rows, columns, outliers };
    const each = [null, ...heatmap.patches.keys()];
    return each.map((layer) => {
      const pick = (list) => (layer === null ? sum(list) : list[layer]);
      const values = layer === null ? heatmap.total : heatmap.patches[layer];
      const parts = `patches ${signed(sum(values))}, class token ${signed(pick(heatmap.class_token))}`;
      const row = `${layer === null ? "attention" : `attention ${layer}`} ${signed(pick(ledger.attention))}`;
      const addition = `${parts}, constants ${signed(pick(heatmap.constant))} = ${row}`;
      if (layer === null) return { ...common, key: "", choice: "all, summed", values, addition };
      return { ...common, key: String(layer), choice: account ? `layer ${layer}` : String(layer), values, addition };
    });
  }

  Vitrine.maps = { of };
}
