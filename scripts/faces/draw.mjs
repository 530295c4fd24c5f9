// Draw faces of DiceBear's style "pixel-art" with their factors: node draw.mjs FIRST COUNT DEST
//
// The face of seed s is the same on every machine. DEST/images.npy is uint8 (COUNT, 32, 32, 3), DEST/labels.npy
// int32 (COUNT,) is the hair style, DEST/factors.json what `jebm ingest --factors` reads. The style draws on a
// grid of 16x16, so that each of its pixels is 2x2 of ours.
import { createWriteStream, mkdirSync, writeFileSync } from "node:fs";
import { once } from "node:events";
import { createAvatar } from "@dicebear/core";
import * as pixelArt from "@dicebear/pixel-art";
import { Resvg } from "@resvg/resvg-js";

const EDGE = 32;
const BACKGROUNDS = ["b6e3f4", "c0aede", "ffd5dc", "ffdfbf", "9bd8a3", "5b6b8c"];
const PARTS = ["accessories", "beard", "clothing", "eyes", "glasses", "hair", "hat", "mouth"];
const OPTIONAL = ["accessories", "beard", "glasses", "hat"];
const COLOURS = ["clothing", "hair", "skin"];

const styleOf = (name) => pixelArt.schema.properties[name].default;
const kinds = (names) => [...new Set(names.map((name) => name.replace(/\d+$/, "")))].sort();

// Each factor's categories, from the style itself, and how a face's description gives one of them.
const factors = { background: [BACKGROUNDS.map((c) => `#${c}`), (f) => f.primaryBackgroundColor] };
for (const part of PARTS) {
  const names = [...styleOf(part)].sort();
  factors[part] = [OPTIONAL.includes(part) ? ["none", ...names] : names, (f) => f[part] ?? "none"];
}
for (const part of COLOURS) {
  factors[`${part}_colour`] = [styleOf(`${part}Color`).map((c) => `#${c}`), (f) => f[`${part}Color`]];
}
factors.hair_length = [kinds(styleOf("hair")), (f) => f.hair.replace(/\d+$/, "")];
factors.mood = [kinds(styleOf("mouth")), (f) => f.mouth.replace(/\d+$/, "")];

const names = Object.keys(factors).sort();

function draw(seed) {
  const options = { seed: String(seed), backgroundColor: BACKGROUNDS, backgroundType: ["solid"] };
  const face = createAvatar(pixelArt, options);
  const facts = face.toJson().extra;
  const drawn = new Resvg(face.toString(), {
    fitTo: { mode: "width", value: EDGE },
    font: { loadSystemFonts: false },
  }).render();
  const rgba = drawn.pixels;
  const rgb = Buffer.alloc(EDGE * EDGE * 3);
  for (let pixel = 0; pixel < EDGE * EDGE; pixel++) {
    if (rgba[4 * pixel + 3] !== 255) throw new Error(`seed ${seed}: a pixel is transparent`);
    rgba.copy(rgb, 3 * pixel, 4 * pixel, 4 * pixel + 3);
  }
  const row = names.map((name) => {
    const [categories, of] = factors[name];
    const index = categories.indexOf(of(facts));
    if (index < 0) throw new Error(`seed ${seed}: ${name} ${of(facts)} is not in the style's list`);
    return index;
  });
  return [rgb, row];
}

function header(type, shape) {
  const words = `{'descr': '${type}', 'fortran_order': False, 'shape': (${shape.join(", ")},), }`;
  const padded = words.padEnd(128 - 10 - 1) + "\n";
  const start = Buffer.from("\x93NUMPY\x01\x00\x00\x00", "latin1");
  start.writeUInt16LE(padded.length, 8);
  return Buffer.concat([start, Buffer.from(padded, "latin1")]);
}

const [first, count] = process.argv.slice(2, 4).map(Number);
const dest = process.argv[4];
mkdirSync(dest, { recursive: true });
const images = createWriteStream(`${dest}/images.npy`);
images.write(header("|u1", [count, EDGE, EDGE, 3]));
const rows = [];
for (let seed = first; seed < first + count; seed++) {
  const [rgb, row] = draw(seed);
  rows.push(row);
  if (!images.write(rgb)) await once(images, "drain");
  if (rows.length % 5000 === 0) console.log(`${rows.length} of ${count} faces`);
}
images.end();
await once(images, "finish");
const labels = Buffer.from(Int32Array.from(rows, (row) => row[names.indexOf("hair")]).buffer);
writeFileSync(`${dest}/labels.npy`, Buffer.concat([header("<i4", [count]), labels]));
const listed = names.map((name) => ({ name, categories: factors[name][0] }));
const table = `"rows": [\n${rows.map((row) => JSON.stringify(row)).join(",\n")}\n]`;
writeFileSync(`${dest}/factors.json`, `{"format": "jebm-factors", "factors": ${JSON.stringify(listed)},\n${table}}\n`);
