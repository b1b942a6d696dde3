// Builds ../assets/viewer.js, dashboard.js and viewer.css from the sources in this folder.
//
//     npm ci && npm run build          (--outdir=DIR writes elsewhere, for the test that compares)
//
// The first line of each script names a digest of the sources, so that a test can tell without node
// that the built file belongs to them.
import { createHash } from "node:crypto";
import { mkdirSync, readFileSync, readdirSync, writeFileSync } from "node:fs";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import { build } from "esbuild";

const here = dirname(fileURLToPath(import.meta.url));
const argument = process.argv.find((word) => word.startsWith("--outdir="));
const outdir = argument ? argument.slice("--outdir=".length) : join(here, "..", "assets");

function digest() {
  const hash = createHash("sha256");
  const names = readdirSync(here).filter((name) => /\.(js|mjs|css|json)$/.test(name));
  for (const name of names.sort()) {
    hash.update(`${name}\0`).update(readFileSync(join(here, name))).update("\0");
  }
  return hash.digest("hex").slice(0, 16);
}

function licences() {
  const lock = JSON.parse(readFileSync(join(here, "package-lock.json"), "utf8"));
  const parts = ["The libraries in viewer.js and dashboard.js and their licences.\n"];
  for (const [path, entry] of Object.entries(lock.packages)) {
    if (!path || entry.dev) continue;
    const name = path.replace(/^node_modules\//, "");
    const text = readFileSync(join(here, path, "LICENSE"), "utf8").trim();
    parts.push(`== ${name} ${entry.version} ==\n\n${text}\n`);
  }
  return parts.join("\n");
}

mkdirSync(outdir, { recursive: true });
const shared = { absWorkingDir: here, bundle: true, minify: true, logLevel: "warning" };
await build({
  ...shared,
  entryPoints: { viewer: "main.js", dashboard: "dashboard.js" },
  outdir,
  format: "iife",
  target: "es2020",
  charset: "ascii",
  legalComments: "inline",
  banner: { js: `/* sources ${digest()}; D3 modules: ISC licence, Mike Bostock, see LICENSES.txt */` },
});
await build({ ...shared, entryPoints: ["viewer.css"], outfile: join(outdir, "viewer.css") });
writeFileSync(join(outdir, "LICENSES.txt"), licences());
