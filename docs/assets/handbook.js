// Formulas by KaTeX, diagrams by mermaid; both are files of this site, and mermaid is loaded only where a page has a diagram.

"use strict";

function formulas() {
  for (const element of document.querySelectorAll(".arithmatex")) {
    const text = element.textContent.trim();
    const display = text.startsWith("\\[");
    katex.render(text.slice(2, -2), element, { displayMode: display, throwOnError: true });
  }
}

function scheme() {
  return document.body.getAttribute("data-md-color-scheme") === "slate" ? "dark" : "neutral";
}

async function draw(sources) {
  mermaid.initialize({ startOnLoad: false, theme: scheme(), fontFamily: "inherit", securityLevel: "strict" });
  let number = 0;
  for (const [element, source] of sources) {
    const { svg } = await mermaid.render(`diagram-${Date.now()}-${number++}`, source);
    element.innerHTML = svg;
  }
}

function diagrams() {
  const found = [...document.querySelectorAll("pre.diagram")];
  if (found.length === 0) return;
  const sources = found.map((pre) => {
    const place = document.createElement("div");
    place.className = "drawn";
    pre.replaceWith(place);
    return [place, pre.textContent];
  });
  const script = document.createElement("script");
  script.src = new URL("../vendor/mermaid/mermaid.tiny.js", here).href;
  script.onload = () => {
    draw(sources);
    new MutationObserver(() => draw(sources)).observe(document.body, { attributeFilter: ["data-md-color-scheme"] });
  };
  document.head.append(script);
}

const here = document.currentScript.src;
formulas();
diagrams();
