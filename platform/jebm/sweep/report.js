"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  // From roles to colours. "rank:x" and the scales run from good (strong) to bad (faint).
  function palette() {
    const style = getComputedStyle(root);
    const colours = {};
    for (const role of ["finished", "pruned", "diverged", "failed", "running", "waiting", "best", "text", "soft", "line", "page"]) {
      colours[role] = style.getPropertyValue(`--${role}`).trim();
    }
    const night = dark.matches && !root.classList.contains("printing");
    const ramp = night
      ? [[226, 244, 255], [86, 174, 240], [43, 92, 138], [38, 50, 64]]
      : [[8, 48, 107], [33, 113, 181], [140, 186, 220], [226, 234, 242]];
    const at = (share) => {
      const place = Math.min(Math.max(share, 0), 1) * (ramp.length - 1);
      const i = Math.min(Math.floor(place), ramp.length - 2);
      const mix = ramp[i].map((low, c) => Math.round(low + (ramp[i + 1][c] - low) * (place - i)));
      return `rgb(${mix.join(",")})`;
    };
    const stops = ramp.map((_, i) => i / (ramp.length - 1));
    return {
      colour: (role) => role.startsWith("rank:") ? at(0.85 * Number(role.slice(5)))
        : role === "axis" ? colours.line : role === "edge" ? colours.page : colours[role] ?? role,
      scale: (name) => stops.map((stop) => [stop, at(name === "good is low" ? stop : 1 - stop)]),
      text: colours.text, soft: colours.soft, line: colours.line, page: colours.page,
    };
  }

  function coloured(value, key, theme) {
    if (key === "colorscale") return theme.scale(value);
    if (Array.isArray(value)) return value.map((item) => coloured(item, key, theme));
    if (value !== null && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, coloured(v, k, theme)]));
    }
    return (key === "color" || key === "bgcolor") && typeof value === "string" ? theme.colour(value) : value;
  }

  function draw(width) {
    const theme = palette();
    const axis = {
      gridcolor: theme.line, linecolor: theme.line, tickcolor: theme.line, zeroline: false, automargin: true,
      exponentformat: "power", separatethousands: true,
      tickfont: { color: theme.soft, size: 12 }, title: { font: { color: theme.soft, size: 13 }, standoff: 10 },
    };
    const template = {
      layout: {
        paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", xaxis: axis, yaxis: axis,
        font: { color: theme.text, size: 13, family: getComputedStyle(document.body).fontFamily },
        legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { color: theme.soft } },
        hoverlabel: { bgcolor: theme.page, bordercolor: theme.line, font: { color: theme.text, size: 12 }, align: "left" },
        modebar: { bgcolor: "rgba(0,0,0,0)", color: theme.line, activecolor: theme.soft },
        hovermode: "closest", margin: { l: 64, r: 16, t: 36, b: 56 },
      },
    };
    for (const place of document.querySelectorAll(".plot")) {
      const figure = coloured(figures[place.dataset.figure], "", theme);
      const size = width ? { width, height: place.offsetHeight } : { autosize: true };
      place.querySelector("noscript")?.remove();
      Plotly.react(place, figure.data, { ...figure.layout, ...size, template }, {
        responsive: true, displaylogo: false,
        modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]],  // plotly's own list has an upload
      });
    }
  }

  function sortable(table) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => head.firstChild.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = (row) => row.cells[column].dataset.sort;
      const rows = [...table.tBodies[0].rows].sort((one, other) => {
        const [a, b] = [key(one), key(other)];
        if (a === "" || b === "") return (a === "") - (b === "");  // what is missing goes last, either way
        const order = a - b || (Number.isNaN(a - b) ? a.localeCompare(b) : 0);
        return up ? order : -order;
      });
      table.tBodies[0].append(...rows);
    }));
  }

  draw();
  dark.addEventListener("change", () => draw());
  window.addEventListener("beforeprint", () => { root.classList.add("printing"); draw(690); });
  window.addEventListener("afterprint", () => { root.classList.remove("printing"); draw(); });
  document.querySelectorAll(".long table").forEach(sortable);
})();
