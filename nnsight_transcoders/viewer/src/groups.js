// Pinned nodes and their groups (supernodes) as one small graph. No document.

/** The units of the small graph: each group, and each pinned node that is in none. */
export function makeUnits(model, { pinned, groups }) {
  const grouped = new Set(groups.flatMap((group) => group.ids));
  const units = groups.map(({ name, ids }) => ({ name, group: true, nodes: numbers(model, ids) }));
  for (const id of pinned) {
    if (!grouped.has(id)) units.push({ name: null, group: false, nodes: numbers(model, [id]) });
  }
  return units.filter((unit) => unit.nodes.length);
}

function numbers(model, ids) {
  return ids.map((id) => model.byId.get(id)).filter((i) => i !== undefined);
}

/** Sums of the shown edges from one unit to another: [{from, to, weight}], largest first. */
export function unitEdges(view, units) {
  const unitOf = new Map(units.flatMap((unit, u) => unit.nodes.map((i) => [i, u])));
  const sums = new Map();
  for (let e = 0; e < view.source.length; e++) {
    const from = unitOf.get(view.source[e]);
    const to = unitOf.get(view.target[e]);
    if (from === undefined || to === undefined || from === to) continue;
    const key = from * units.length + to;
    sums.set(key, (sums.get(key) ?? 0) + view.weight[e]);
  }
  return Array.from(sums, ([key, weight]) => ({
    from: Math.floor(key / units.length),
    to: key % units.length,
    weight,
  })).sort((a, b) => Math.abs(b.weight) - Math.abs(a.weight));
}

/** Places of the units in a box: rows by mean layer, in a row by mean position. */
export function placeUnits(model, units, width, rowHeight) {
  const mean = (unit, table) => unit.nodes.reduce((sum, i) => sum + table[i], 0) / unit.nodes.length;
  const order = units.map((unit, u) => ({ u, layer: mean(unit, model.layer), position: mean(unit, model.position) }));
  order.sort((a, b) => b.layer - a.layer || a.position - b.position);
  const rows = [];
  for (const unit of order) {
    const row = rows[rows.length - 1];
    const fits = row && Math.round(row[0].layer) === Math.round(unit.layer) && row.length < 3;
    if (fits) row.push(unit);
    else rows.push([unit]);
  }
  const places = new Array(units.length);
  rows.forEach((row, r) => {
    row.sort((a, b) => a.position - b.position);
    const share = width / row.length;
    // Rows of one alternate a little, so that edges between them do not lie on one another.
    const sway = row.length === 1 ? (r % 2 ? 1 : -1) * width * 0.09 : 0;
    row.forEach(({ u }, at) => {
      places[u] = { x: share * (at + 0.5) + sway, y: rowHeight * (r + 0.5), width: Math.min(132, share - 12) };
    });
  });
  return { places, height: rows.length * rowHeight };
}
