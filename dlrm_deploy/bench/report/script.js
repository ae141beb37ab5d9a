"use strict";
// Values under the pointer, two buttons beside the engines' switches, and tables unfolded on paper. The page works without.
(() => {
  const REACH_PX = 36;
  const tip = document.getElementById("tip");

  function says(mark) {
    const title = mark.querySelector("title");
    if (title) {
      mark.dataset.says = title.textContent; // the browser's own bubble would cover ours
      title.remove();
    }
    return mark.dataset.says || "";
  }

  function nearest(chart, x, y) {
    let best = null;
    let least = REACH_PX;
    for (const mark of chart.querySelectorAll(".mark")) {
      const box = mark.getBoundingClientRect();
      if (!box.width) continue; // switched off
      const dx = Math.max(box.left - x, 0, x - box.right);
      const dy = Math.max(box.top - y, 0, y - box.bottom);
      const centre = Math.hypot(x - (box.left + box.right) / 2, y - (box.top + box.bottom) / 2);
      const distance = Math.hypot(dx, dy) + centre / 1000;
      if (distance < least) [best, least] = [mark, distance];
    }
    return best;
  }

  function clear(chart) {
    chart.classList.remove("lit");
    for (const element of chart.querySelectorAll(".hot, .point")) element.classList.remove("hot", "point");
    tip.hidden = true;
  }

  function show(chart, event) {
    clear(chart);
    const mark = nearest(chart, event.clientX, event.clientY);
    if (!mark) return;
    mark.classList.add("point");
    if (mark.dataset.e) {
      chart.classList.add("lit");
      for (const element of chart.querySelectorAll(`[data-e="${mark.dataset.e}"]`)) element.classList.add("hot");
    }
    const [head, ...lines] = says(mark).split(" · ");
    const bold = document.createElement("b");
    bold.textContent = head;
    tip.replaceChildren(bold, lines.join(" · "));
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = Math.min(Math.max(event.clientX - box.width / 2, 6), document.documentElement.clientWidth - box.width - 6);
    const above = event.clientY - box.height - 18;
    tip.style.transform = `translate(${left}px, ${above > 6 ? above : event.clientY + 22}px)`;
  }

  for (const chart of document.querySelectorAll(".chart")) {
    for (const mark of chart.querySelectorAll(".mark")) says(mark);
    chart.addEventListener("pointermove", (event) => show(chart, event));
    chart.addEventListener("pointerdown", (event) => show(chart, event));
    chart.addEventListener("pointerleave", () => clear(chart));
  }

  const switches = document.querySelector(".switches");
  if (switches) {
    const boxes = [...switches.querySelectorAll("input")];
    const button = (label, wanted) => {
      const made = document.createElement("button");
      made.type = "button";
      made.textContent = label;
      made.addEventListener("click", () => boxes.forEach((box) => { box.checked = wanted(box); }));
      switches.append(made);
    };
    if (boxes.some((box) => !("essential" in box.dataset))) {
      button("ours and the fastest peers", (box) => "essential" in box.dataset);
      button("all", () => true);
    }
  }

  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details:not([open])")];
    for (const details of opened) details.open = true;
  });
  addEventListener("afterprint", () => {
    for (const details of opened) details.open = false;
  });
})();
