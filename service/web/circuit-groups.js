"use strict";
/** One image's circuit summed over tokens, as `service.answers.circuit_groups` does: tested to be the same. */
{
  /**
   * @param {Object} answer the API's CircuitResponse
   * @returns {Object} the API's GroupedCircuit of it
   */
  function grouped(answer) {
    const { nodes, edges, target, inflow, predictions, request_id: id, timings_ms: timings, ...same } = answer;
    const found = new Map(); // by name, in the order of their first nodes
    for (const node of nodes) {
      if (!found.has(name(node))) found.set(name(node), []);
      found.get(name(node)).push(node);
    }
    const names = [...found.keys()];
    const all = names.map((one) => ({ one, group: group(found.get(one)) }));
    all.sort((a, b) => b.group.influence - a.group.influence);
    const placeOf = new Map(all.map(({ one }, place) => [one, place]));
    const of = (place) => (place === null ? null : placeOf.get(name(nodes[place])));
    return {
      ...same,
      images: 1,
      targets: { [target]: 1 },
      groups: all.map(({ group: one }) => one),
      edges: summed(edges.map(({ source, target: into, weight }) => ({ source: of(source), target: of(into), weight }))),
      unfollowed_share: inflow.unfollowed_share,
      nodes: nodes.length,
    };
  }

  function name({ kind, layer, index }) {
    return `${kind} ${layer} ${index}`;
  }

  function group(nodes) {
    const [{ kind, layer, index, label, label_score }] = nodes;
    const followed = nodes.filter(({ inflow }) => inflow !== null);
    const weight = sum(followed, ({ influence }) => influence);
    const unfollowed = sum(followed, ({ influence, inflow }) => influence * inflow.unfollowed_share);
    return {
      kind,
      layer,
      index,
      label,
      label_score,
      images: 1,
      tokens: nodes.length,
      influence: sum(nodes, ({ influence }) => influence),
      contribution: sum(nodes, ({ contribution }) => contribution),
      unfollowed_share: weight ? unfollowed / weight : null,
      where: nodes.map(({ token, influence, activation }) => ({ token, influence, activation })),
    };
  }

  function summed(edges) {
    const found = new Map();
    for (const { source, target, weight } of edges) {
      const ends = `${source} ${target}`;
      const before = found.get(ends)?.weight ?? 0;
      found.set(ends, { source, target, weight: before + weight, images: 1 });
    }
    return [...found.values()];
  }

  function sum(values, of) {
    return values.reduce((total, value) => total + of(value), 0);
  }

  /** The circuit with its `count` most influential groups alone, and the edges between them and into the target. */
  function mostInfluential(circuit, count) {
    const isIn = (place) => place === null || place < count;
    const edges = circuit.edges.filter(({ source, target }) => isIn(source) && isIn(target));
    return { ...circuit, groups: circuit.groups.slice(0, count), edges };
  }

  Vitrine.circuitGroups = { grouped, mostInfluential };
}
