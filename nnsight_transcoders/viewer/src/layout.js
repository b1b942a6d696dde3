// Positions of the shown nodes: x by token, y by layer. No document: a test runs this under node.
//
// A column is as wide as its fullest cell needs, and what is left over is shared out, so a short
// prompt with many features at its last token uses the width where the features are.

const PITCH_MOST = 24;
const PITCH_LEAST = 5.5;
const COLUMN_LEAST = 7;
const ROW_LEAST = 11;
const RADIUS_LEAST = 2.5;
const GROWTH = 1.12;
const SCALE_MOST = 8;
const CHIP_HEIGHT = 22;
const CHIP_GAP = 5;

/**
 * Places the nodes in a plot {width, height, columnLeast}; the world may come out larger than it.
 *
 * chipWidth(node) gives the width of a logit's box. Returns {x, y, r, pitch, columns, rows, width,
 * height, chips}, with x, y and r by node number.
 */
export function layout(model, view, plot, chipWidth) {
  const cells = fillCells(model, view);
  const logits = view.nodes.filter((i) => model.isLogit[i]);
  const { band, rows, pitch, columns, width } = fit(model, cells, logits, plot, chipWidth);
  const out = {
    x: new Float64Array(model.n),
    y: new Float64Array(model.n),
    r: new Float64Array(model.n),
    pitch,
    columns,
    rows: rows.list,
    width,
    height: rows.height,
    chips: new Map(),
  };
  placeCells(out, model, view, cells, rows);
  placeChips(out, model, logits, chipWidth, band.height);
  return out;
}

/** Rows and columns in the smallest world of the plot's shape that holds the nodes. */
function fit(model, cells, logits, plot, chipWidth) {
  for (let scale = 1; ; scale *= GROWTH) {
    const world = { ...plot, width: plot.width * scale, height: plot.height * scale };
    const band = chipBand(logits, chipWidth, world.width);
    const rows = makeRows(model.nLayers, world.height, band.height);
    const columns = makeColumns(cells, world, rows.step);
    const fits = columns.width <= world.width + 1 && rows.height <= world.height + 1;
    if (fits || scale > SCALE_MOST) return { band, rows, ...columns };
  }
}

/** Nodes by position and layer, logits left out: a map from position to a map from layer. */
function fillCells(model, view) {
  const cells = new Map();
  for (const i of view.nodes) {
    if (model.isLogit[i]) continue;
    const column = cells.get(model.position[i]) ?? new Map();
    cells.set(model.position[i], column);
    const cell = column.get(model.layer[i]) ?? [];
    column.set(model.layer[i], cell);
    cell.push(i);
  }
  return cells;
}

/** Height of the logits' band: its boxes flow into as many lines as they need. */
function chipBand(logits, chipWidth, width) {
  let lines = 1;
  let used = 0;
  for (const i of logits) {
    const needed = chipWidth(i) + CHIP_GAP;
    if (used + needed > width - 8 && used > 0) {
      lines += 1;
      used = 0;
    }
    used += needed;
  }
  return { height: lines * (CHIP_HEIGHT + CHIP_GAP) + 8 };
}

/** Rows from the tokens (layer -1) at the bottom to the last layer, below the logits' band. */
function makeRows(nLayers, plotHeight, bandHeight) {
  const step = Math.max(ROW_LEAST, (plotHeight - bandHeight) / (nLayers + 1));
  const height = bandHeight + step * (nLayers + 1);
  const list = [];
  for (let layer = -1; layer < nLayers; layer++) {
    const bottom = height - (layer + 1) * step;
    list.push({ layer, y0: bottom - step, y1: bottom, y: bottom - step / 2 });
  }
  list.push({ layer: nLayers, y0: 0, y1: bandHeight, y: bandHeight / 2 });
  return { step, height, list, of: (layer) => list[Math.min(layer, nLayers) + 1] };
}

/** The largest node spacing at which the columns fit, and the columns. */
function makeColumns(cells, { columnLeast, width: plotWidth }, step) {
  let pitch = PITCH_MOST;
  let needs = columnNeeds(cells, columnLeast, step, pitch);
  while (pitch > PITCH_LEAST && total(needs) > plotWidth) {
    pitch -= 0.5;
    needs = columnNeeds(cells, columnLeast, step, pitch);
  }
  const needed = total(needs);
  const spare = Math.max(0, plotWidth - needed);
  const columns = [];
  let x = 0;
  for (const need of needs) {
    const width = need + spare * (0.35 / needs.length + (0.65 * need) / needed);
    columns.push({ x0: x, x1: x + width, x: x + width / 2 });
    x += width;
  }
  return { pitch, columns, width: x };
}

function columnNeeds(cells, columnLeast, step, pitch) {
  const lines = linesPerCell(step, pitch);
  const gap = Math.max(2, pitch * 0.5);
  return columnLeast.map((least, position) => {
    const sizes = Array.from(cells.get(position)?.values() ?? [], (cell) => cell.length);
    const most = sizes.length ? Math.max(...sizes) : 0;
    return Math.max(least, COLUMN_LEAST, Math.ceil(most / lines) * pitch + gap);
  });
}

function linesPerCell(step, pitch) {
  return Math.max(1, Math.floor((step - 2) / pitch));
}

function total(numbers) {
  return numbers.reduce((sum, value) => sum + value, 0);
}

/** Fills each cell in order of index, line by line, centred. */
function placeCells(out, model, view, cells, rows) {
  const most = Math.max(1e-12, ...view.nodes.map((i) => (model.isLogit[i] ? 0 : view.influence[i])));
  const size = Math.max(RADIUS_LEAST, Math.min(out.pitch, rows.step) * 0.45);
  for (const [position, column] of cells) {
    const { x, x0, x1 } = out.columns[Math.min(position, out.columns.length - 1)];
    const across = Math.max(1, Math.floor((x1 - x0 - 4) / out.pitch));
    for (const [layer, cell] of column) {
      const lines = Math.ceil(cell.length / across);
      const perLine = Math.ceil(cell.length / lines);
      const drop = Math.min(out.pitch, rows.step / lines);
      cell.sort((a, b) => model.index[a] - model.index[b]);
      cell.forEach((i, at) => {
        const line = Math.floor(at / perLine);
        const inLine = Math.min(perLine, cell.length - line * perLine);
        out.x[i] = x + ((at % perLine) - (inLine - 1) / 2) * out.pitch;
        out.y[i] = rows.of(layer).y + (line - (lines - 1) / 2) * drop;
        out.r[i] = Math.max(RADIUS_LEAST, size * (0.55 + 0.45 * Math.sqrt(view.influence[i] / most)));
      });
    }
  }
}

/** Logit boxes, most probable first, ending at the right edge of their token's column. */
function placeChips(out, model, logits, chipWidth, bandHeight) {
  const order = [...logits].sort((a, b) => model.probability[b] - model.probability[a] || a - b);
  const widths = total(order.map((i) => chipWidth(i) + CHIP_GAP));
  const column = order.length ? out.columns[model.position[order[0]]] : undefined;
  const centre = column?.x ?? out.width;
  const start = Math.max(4, Math.min(centre - widths / 2, out.width - widths));
  let x = start;
  let y = CHIP_GAP + 3;
  for (const i of order) {
    const width = chipWidth(i);
    if (x + width > out.width && x > start) {
      x = start;
      y += CHIP_HEIGHT + CHIP_GAP;
    }
    out.chips.set(i, { width, height: CHIP_HEIGHT });
    out.x[i] = x + width / 2;
    out.y[i] = Math.min(y, bandHeight - CHIP_HEIGHT) + CHIP_HEIGHT / 2;
    out.r[i] = CHIP_HEIGHT / 2;
    x += width + CHIP_GAP;
  }
}
