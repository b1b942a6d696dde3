// A histogram of activations: counts are drawn on a logarithmic axis, since small activations are
// by far the most frequent ones.
import { axisBottom, axisLeft } from "d3-axis";
import { scaleLinear, scaleSymlog } from "d3-scale";
import { select } from "d3-selection";
import { svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 110;
const MARGIN = { top: 6, right: 8, bottom: 20, left: 44 };

/** Counts of equal bins as bars up to the largest activation; null if there are none. */
export function histogram(data, most) {
  const counts = data?.counts;
  if (!Array.isArray(counts) || !(data.width > 0) || !counts.some((count) => count > 0)) return null;
  const used = counts.slice(0, Math.max(1, Math.ceil(most / data.width)));
  const x = scaleLinear([0, used.length * data.width], [MARGIN.left, WIDTH - MARGIN.right]);
  const y = scaleSymlog([0, Math.max(...used)], [HEIGHT - MARGIN.bottom, MARGIN.top]);
  const title = `Histogram of ${counts.reduce((sum, count) => sum + count, 0).toLocaleString("en")} activations`;
  const picture = svg(
    "svg",
    { class: "histogram", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": title },
    svg("title", {}, title),
  );
  const drawing = select(picture);
  drawing
    .append("g")
    .attr("class", "bars")
    .selectAll("rect")
    .data(used)
    .join("rect")
    .attr("x", (_, bin) => x(bin * data.width) + 0.5)
    .attr("width", Math.max(0.5, x(data.width) - x(0) - 1))
    .attr("y", (count) => y(count))
    .attr("height", (count) => y(0) - y(count));
  axis(drawing, axisBottom(x).ticks(5), `translate(0,${HEIGHT - MARGIN.bottom})`);
  axis(drawing, axisLeft(y).tickValues(countTicks(Math.max(...used))), `translate(${MARGIN.left},0)`);
  return picture;
}

function axis(drawing, made, transform) {
  drawing.append("g").attr("class", "axis-line").attr("transform", transform).call(made.tickSize(3));
}

/** Powers of ten, at most four of them. */
function countTicks(most) {
  const powers = Array.from({ length: Math.floor(Math.log10(Math.max(1, most))) + 1 }, (_, p) => 10 ** p);
  const step = Math.ceil(powers.length / 4);
  return powers.filter((_, at) => at % step === 0);
}
