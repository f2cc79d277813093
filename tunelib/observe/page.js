// The values under the pointer: a line, and beside it each curve's nearest point.
for (const figure of document.querySelectorAll("figure")) {
  const plot = figure.querySelector(".plot"), data = JSON.parse(figure.querySelector("script").textContent);
  const line = document.createElement("div"), tip = document.createElement("div");
  line.className = "at"; tip.className = "tip"; line.hidden = tip.hidden = true;
  plot.append(line, tip);
  const nearest = (points, step) => points.reduce((best, point) => Math.abs(point[0] - step) < Math.abs(best[0] - step) ? point : best);
  const show = event => {
    const box = plot.getBoundingClientRect();
    const share = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width)), wanted = share * data.last;
    const found = data.curves.map(([colour, name, points]) => [colour, name, nearest(points, wanted)]);
    const step = found.map(([, , point]) => point[0]).reduce((best, own) => Math.abs(own - wanted) < Math.abs(best - wanted) ? own : best);
    line.style.left = `${100 * step / data.last}%`;
    tip.replaceChildren(`step ${step.toLocaleString("en")}`);
    for (const [colour, name, point] of found) {
      const row = document.createElement("div"), value = document.createElement("b");
      value.className = `c${colour}`; value.textContent = point[1].toLocaleString("en", {maximumSignificantDigits: 5});
      row.append(value, name ? ` ${name}` : "", point[0] === step ? "" : ` (step ${point[0].toLocaleString("en")})`);
      tip.append(row);
    }
    tip.style.left = share < 0.5 ? `calc(${100 * step / data.last}% + 10px)` : "auto";
    tip.style.right = share < 0.5 ? "auto" : `calc(${100 - 100 * step / data.last}% + 10px)`;
    line.hidden = tip.hidden = false;
  };
  plot.addEventListener("pointermove", show);
  plot.addEventListener("pointerdown", show);
  plot.addEventListener("pointerleave", () => { line.hidden = tip.hidden = true; });
}
