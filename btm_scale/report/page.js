// Draws the page's figures with plotly, in the colours of the reader's theme, at the width of the column.
"use strict";
(() => {
  const roles = new Map();
  for (const colours of Object.values(JSON.parse(document.getElementById("palette").textContent)))
    for (const colour of colours) roles.set(colour, colours);
  const [LIGHT, DARK] = [0, 1];
  const dark = matchMedia("(prefers-color-scheme: dark)"), print = matchMedia("print");
  const PRINTED = 680; // pixels of A4 and of Letter within the margins

  // A copy of a figure's part with the palette's colours in another theme. Only colours change: a name may look like one.
  const painted = (part, theme, isColour = false) => {
    if (typeof part === "string") return (isColour && roles.get(part)?.[theme]) || part;
    if (part === null || typeof part !== "object" || ArrayBuffer.isView(part)) return part;
    if (Array.isArray(part)) return part.map((item) => painted(item, theme, isColour));
    return Object.fromEntries(
      Object.entries(part).map(([key, value]) => [key, painted(value, theme, isColour || /colou?r/.test(key))]));
  };

  const save = (box) => {
    const layout = painted(box.layout, LIGHT);
    const title = { text: box.getAttribute("aria-label"), x: 0.01, y: 1, yref: "container", yanchor: "top", pad: { t: 10 } };
    const margin = { ...layout.margin, t: (layout.margin?.t ?? 8) + 36, l: 16, r: (layout.margin?.r ?? 0) + 16, b: (layout.margin?.b ?? 8) + 8 };
    const [width, height] = [box.clientWidth + 32, box.clientHeight + 44];
    const legend = layout.legend?.y === 1 ? { ...layout.legend, y: 1 - 36 / height } : layout.legend; // below the title
    const whole = { ...layout, title, margin, legend, width, height, paper_bgcolor: "#ffffff" };
    Plotly.downloadImage({ data: painted(box.data, LIGHT), layout: whole, config: {} },
      { format: "png", filename: box.dataset.name, width, height, scale: 2 });
  };
  const icon = { width: 24, height: 24, path: "M11 3h2v9l3-3 1.4 1.4L12 15.8 6.6 10.4 8 9l3 3zM4 17h2v2h12v-2h2v4H4z" };
  const saveButton = { name: "save", title: "Save as PNG", icon, click: save };

  const draw = (box, { theme = dark.matches ? DARK : LIGHT, width = 0 } = {}) => {
    const { data, layout, narrow } = box.figure;
    const chosen = (width || box.clientWidth) < 600 ? narrow : layout;
    box.narrow = chosen === narrow;
    const size = width ? { width, autosize: false } : { autosize: true };
    Plotly.react(box, painted(data, theme), { ...painted(chosen, theme), ...size }, {
      displaylogo: false, responsive: !width,
      modeBarButtons: [chosen.dragmode === false ? [saveButton] : [saveButton, "resetScale2d"]],
    });
  };

  document.documentElement.classList.add("scripted");
  for (const details of document.querySelectorAll("details.data")) details.open = false;
  addEventListener("DOMContentLoaded", () => {
    const boxes = [...document.querySelectorAll(".chart")];
    for (const box of boxes) {
      const source = box.querySelector("script");
      box.figure = JSON.parse(source.textContent);
      source.remove();
      try {
        draw(box);
      } catch (error) { // its table has the numbers
        console.error(box.dataset.name, error);
        box.hidden = true;
        for (const details of box.closest("figure").querySelectorAll("details")) details.open = true;
        continue;
      }
      // The curve under the pointer is clear of the others.
      const marked = (event) => box.querySelector(`.trace${event.points[0].fullData.uid}`);
      box.on("plotly_hover", (event) => { box.classList.add("hovered"); marked(event)?.classList.add("hovered"); });
      box.on("plotly_unhover", (event) => { box.classList.remove("hovered"); marked(event)?.classList.remove("hovered"); });
    }
    const drawn = boxes.filter((box) => !box.hidden);
    const again = (how) => drawn.forEach((box) => draw(box, how));
    const forPrint = () => drawn.forEach((box) => draw(box, { theme: LIGHT, width: PRINTED }));
    dark.addEventListener("change", () => again());
    addEventListener("beforeprint", forPrint);
    addEventListener("afterprint", () => again());
    print.addEventListener("change", () => (print.matches ? forPrint() : again()));
    addEventListener("resize", () =>
      drawn.forEach((box) => !print.matches && box.narrow !== box.clientWidth < 600 && draw(box)));
  });
})();
