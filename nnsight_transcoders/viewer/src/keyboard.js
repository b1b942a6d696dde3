// Keys: arrows move between nodes, Escape clears, "/" searches, p pins, + - 0 zoom.

const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/** The nearest node in a direction; what lies to the side counts more than what lies ahead. */
export function neighbour(nodes, places, from, [dx, dy]) {
  let best = null;
  let least = Infinity;
  for (const i of nodes) {
    const x = places.x[i] - places.x[from];
    const y = places.y[i] - places.y[from];
    const ahead = x * dx + y * dy;
    const aside = Math.abs(x * dy) + Math.abs(y * dx);
    if (i === from || ahead < 0.5 || aside > 4 * ahead) continue;
    const cost = ahead + 2.5 * aside;
    if (cost < least) {
      least = cost;
      best = i;
    }
  }
  return best;
}

/** Listens for keys; actions has move(direction), clear(), search(), pin(), zoom(factor), fit(). */
export function listenForKeys(actions) {
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") return void actions.clear();
    const target = event.target;
    if (target.closest?.("input, textarea, select")) return;
    const inPanel = Boolean(target.closest?.("#side"));
    if (event.key in DIRECTIONS && !inPanel) {
      event.preventDefault();
      actions.move(DIRECTIONS[event.key]);
    } else if (event.key === "/") {
      event.preventDefault();
      actions.search();
    } else if (event.key === "p") actions.pin();
    else if (event.key === "+" || event.key === "=") actions.zoom(1.5);
    else if (event.key === "-") actions.zoom(1 / 1.5);
    else if (event.key === "0") actions.fit();
  });
}
