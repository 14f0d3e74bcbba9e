// Line plots on uPlot, for the run view and the dashboard of usage. Colours follow the theme.

/** Returns the indices of known values between two gaps: without a line, they are drawn as points. */
const isolatedPoints = values => values.flatMap((value, index) =>
  value !== null && (values[index - 1] ?? null) === null && (values[index + 1] ?? null) === null ? [index] : []);

window.LinePlot = class {
  /**
   * Creates an empty plot.
   * @param container The element that it fills in width.
   * @param options `height` in pixels; `axes`: options of uPlot for x and y; `scale`: uPlot's options of the x scale;
   *   `range(low, high)`: limits of the y axis; `cursor`: uPlot's options of the cursor; `settings`: further ones of uPlot;
   *   `onCursor(index)` with the index of the x value under the pointer, null without; `onSelect(first, last)` with the
   *   x values of a dragged span; `onReset()` for a double click.
   */
  constructor(container, options) {
    Object.assign(this, {container, options, plot: null, key: ''});
  }

  /**
   * Draws lines; the plot is created again only if its width, its variant or the names of its lines change.
   * @param x The x values, ascending.
   * @param lines Each with a `name`, its `values`, and uPlot's options of a series.
   * @param variant Text that stands for other options that changed.
   * @returns Whether the plot is visible.
   */
  draw(x, lines, variant = '') {
    const width = this.container.clientWidth, data = [x, ...lines.map(line => line.values)];
    if (!width) return false;
    const key = JSON.stringify([variant, width, ...lines.map(line => line.name)]);
    if (key === this.key) { this.plot.setData(data, false); return true; }
    const {left, top} = this.plot ? this.plot.cursor : {};
    if (this.plot) this.plot.destroy();
    this.key = key;
    const {height, axes, scale, range, cursor, settings, onCursor, onSelect, onReset} = this.options;
    this.plot = new uPlot({
      ...settings, width, height, legend: {show: false}, cursor, padding: [8, 24, 0, 0],
      scales: {x: scale, y: {range: (_, low, high) => low === null ? [0, 1] : range(low, high)}},
      axes: axes.map(axis => ({...this.axisStyle(), ...axis})),
      series: [{}, ...lines.map(line => ({...line, values: undefined, points: {filter: line.spanGaps ? null : (plot, index) => isolatedPoints(plot.data[index]), ...line.points}}))],
      hooks: {
        setCursor: [plot => onCursor(this.index)],
        setSelect: [plot => {
          const {left, width: selected} = plot.select;
          if (selected >= 5) onSelect(plot.posToVal(left, 'x'), plot.posToVal(left + selected, 'x'));
        }],
      },
    }, data, this.container);
    this.plot.over.addEventListener('dblclick', onReset);
    if (left >= 0) this.plot.setCursor({left, top});
    return true;
  }

  /** The index of the x value under the pointer, null without. */
  get index() { return this.plot ? this.plot.cursor.idx ?? null : null; }

  /** Shows a span of x. */
  setRange(min, max) {
    if (this.plot) this.plot.setScale('x', {min, max});
  }

  /** Shows or hides a line. */
  setVisible(index, visible) {
    if (this.plot) this.plot.setSeries(index + 1, {show: visible});
  }

  axisStyle() {
    const colour = name => () => getComputedStyle(this.container).getPropertyValue(name).trim();
    const grid = {stroke: colour('--border-color-primary'), width: 1}, font = '11px system-ui, sans-serif';
    return {stroke: colour('--body-text-color-subdued'), grid, ticks: grid, font, labelFont: font, labelSize: 18};
  }
};
