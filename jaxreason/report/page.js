"use strict";
const tip = document.getElementById("tip");

for (const box of document.querySelectorAll("nav input")) {
  box.addEventListener("change", () => {
    for (const part of document.querySelectorAll(".s" + box.dataset.index)) part.classList.toggle("hidden", !box.checked);
  });
}

function nearest(values, step) {
  return values.reduce((best, value) => (Math.abs(value[0] - step) < Math.abs(best[0] - step) ? value : best));
}

for (const svg of document.querySelectorAll("svg[data-x]")) {
  const [first, span, left, width] = JSON.parse(svg.dataset.x);
  const cursor = svg.querySelector(".cursor");
  const losses = [...svg.querySelectorAll(".loss")].map((group) => ({ group, values: JSON.parse(group.dataset.values) }));

  svg.addEventListener("pointermove", (event) => {
    const frame = svg.getBoundingClientRect();
    const x = ((event.clientX - frame.left) / frame.width) * svg.viewBox.baseVal.width;
    const shown = losses.filter(({ group }) => !group.classList.contains("hidden"));
    if (!shown.length) return;
    const step = nearest(shown[0].values, first + ((x - left) / width) * span)[0];
    const at = left + ((step - first) / span) * width;
    cursor.setAttribute("x1", at);
    cursor.setAttribute("x2", at);
    cursor.style.visibility = "visible";
    tip.replaceChildren(svg.dataset.axis + " " + step);
    for (const { group, values } of shown) {
      const [, mean, low, high] = nearest(values, step);
      const mark = document.createElement("i");
      mark.className = "c" + (group.dataset.index % 8);
      mark.textContent = "\n■ ";
      tip.append(mark, group.dataset.label + "  " + mean + (low === high ? "" : "  (" + low + "–" + high + ")"));
    }
    tip.hidden = false;
    tip.style.left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 8) + "px";
    tip.style.top = Math.min(event.clientY + 14, innerHeight - tip.offsetHeight - 8) + "px";
  });
  svg.addEventListener("pointerleave", () => {
    cursor.style.visibility = "hidden";
    tip.hidden = true;
  });
}
