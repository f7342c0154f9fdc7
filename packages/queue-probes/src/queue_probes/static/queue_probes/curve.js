// Draws one value a minute as a line, in SVG that takes the width it is given.
const curve = (() => {
  const HEIGHT = 100;
  const FLOOR = 0.001;

  function shape(tag, kind, attributes) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    made.setAttribute("class", kind);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    return made;
  }

  // Split into runs of minutes with values; null for at most `bridge` minutes does not end a run.
  function runs(values, bridge) {
    const found = [];
    values.forEach((value, minute) => {
      if (value === null) return;
      const last = found.at(-1);
      if (last && minute - last.at(-1).minute <= bridge + 1) last.push({ minute, value });
      else found.push([{ minute, value }]);
    });
    return found;
  }

  function hours(minutes) {
    return minutes % 60 ? `${minutes} min` : `${minutes / 60} h`;
  }

  // `limit`: from where a value is bad. `log`: seconds on a logarithmic scale. Returns a figure.
  return (values, { minutes, bridge, limit = null, log = false, format, label }) => {
    const known = values.filter((value) => value !== null);
    const most = Math.max(...known, 0);
    const top = Math.max(most, log ? 2 * limit : 1);
    const part = (value) => (log ? Math.log(Math.max(value, FLOOR) / FLOOR) / Math.log(top / FLOOR) : value / top);
    const y = (value) => (HEIGHT - 4 - 90 * part(value)).toFixed(1);
    const svg = shape("svg", "curve", {
      viewBox: `0 0 ${minutes} ${HEIGHT}`,
      preserveAspectRatio: "none",
      role: "img",
      "aria-label": known.length ? `${label}: at most ${format(most)}, now ${format(known.at(-1))}` : `${label}: nothing yet`,
    });
    const found = runs(values, bridge);
    const gap = (from, to) => svg.append(shape("rect", "gap", { x: from, y: 0, width: to - from, height: HEIGHT }));
    found.slice(1).forEach((run, index) => gap(found[index].at(-1).minute, run[0].minute));
    if (found.length && minutes - 1 - found.at(-1).at(-1).minute > bridge) gap(found.at(-1).at(-1).minute, minutes);
    if (limit !== null) svg.append(shape("path", "limit", { d: `M0 ${y(limit)}H${minutes}` }));
    for (const run of found) {
      const line = run.map(({ minute, value }) => `${minute + 0.5} ${y(value)}`).join("L");
      const [first, last] = [run[0].minute + 0.5, run.at(-1).minute + 0.5];
      svg.append(shape("path", "area", { d: `M${first} ${HEIGHT}L${line}L${last} ${HEIGHT}Z` }));
      svg.append(shape("path", "line", { d: `M${line}${run.length === 1 ? "h0" : ""}` }));
    }
    if (found.length) {
      const { minute, value } = found.at(-1).at(-1);
      svg.append(shape("path", "dot", { d: `M${minute + 0.5} ${y(value)}h0` }));
    }
    const middle = known.length ? `most ${format(most)}` : "nothing yet";
    const figure = document.createElement("figure");
    const caption = document.createElement("figcaption");
    for (const text of [`${hours(minutes)} ago`, middle, "now"]) {
      const made = document.createElement("span");
      made.textContent = text;
      caption.append(made);
    }
    figure.append(svg, caption);
    return figure;
  };
})();
