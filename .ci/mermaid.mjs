// Parse every Mermaid diagram of a Markdown file: node mermaid.mjs FILE
import { readFileSync } from "node:fs";
import { JSDOM } from "jsdom";

globalThis.window = new JSDOM("").window; // Mermaid cleans its labels with a browser's means
const { default: mermaid } = await import("mermaid");
const text = readFileSync(process.argv[2], "utf8");
const diagrams = [...text.matchAll(/^```mermaid\n(.*?)^```$/gms)];
for (const [, diagram] of diagrams) await mermaid.parse(diagram);
if (!diagrams.length) throw new Error("no diagram found");
console.log(`${diagrams.length} diagrams parsed`);
