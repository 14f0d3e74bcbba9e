// Draws the dashboard from props.value. Runs once, when the component loads. Text is inserted with textContent only.

const COLOURS = 8;  // CSS classes colour-0 to colour-7
const byClass = (name, parent = element) => parent.querySelector('.' + name);
const fromTemplate = name => byClass(name).content.firstElementChild.cloneNode(true);
const generateButton = byClass('dash-generate'), budgetForm = byClass('dash-budget-form'), machineForm = byClass('machine-form'), alertForm = byClass('alert-form');
const charts = new Map();  // the drawn charts by title
const zooms = [];  // the periods before each zoom, latest last
let zooming = false;  // whether a period was selected that is not drawn yet
let drawnBudgets = '', drawnAlerts = '';  // JSON of the budgets and alerts that are drawn

/** Returns the CSS class of the colour of the line at an index. */
const colourClass = index => 'colour-' + index % COLOURS;

/** Creates a table row whose first cell is its header; in the table's head every cell is one. */
function createRow(cells, inHead) {
  const row = createNode('tr');
  cells.forEach((text, column) => {
    const cell = createNode(inHead || column === 0 ? 'th' : 'td', '', text);
    if (inHead) cell.scope = 'col'; else if (column === 0) cell.scope = 'row';
    row.append(cell);
  });
  return row;
}

/** Replaces a table's rows, and its head unless that is null. */
function fillTable(table, head, rows) {
  if (head) table.tHead.replaceChildren(createRow(head, true));
  table.tBodies[0].replaceChildren(...rows.map(cells => createRow(cells)));
}

/** Draws the snapshot: an error, an offer of sample traffic if there are no calls, or the dashboard. */
function draw() {
  const data = props.value || null;
  const error = data && data.error;
  setText(byClass('dash-error'), error || '');
  byClass('dash-error').hidden = !error;
  byClass('dash-error').classList.toggle('notice', Boolean(data && data.notice));
  byClass('dash').hidden = !data || Boolean(error);
  if (!data || error) return;
  setText(byClass('period-text'), data.period);
  zooming = false;
  if (data.filter.period !== 'custom') zooms.length = 0;
  byClass('zoom-out').hidden = !zooms.length;
  byClass('dash-empty').hidden = !data.empty;
  byClass('dash-content').hidden = data.empty;
  setText(byClass('dash-generate-status'), '');
  generateButton.disabled = false;
  if (!data.empty) drawContent(data);
  drawBudgets(data.budgets);
  drawAlerts(data.alerts);
  drawMachine(data.machine);
  byClass('dash-recent').hidden = !data.recent.length;
  const recent = byClass('dash-recent').querySelector('table');
  fillTable(recent, null, data.recent);
  data.recent_runs.forEach((run, row) => linkRun(recent.tBodies[0].rows[row].cells[2], run));
}

/** Makes a cell's text a link to a run, unless the run is ''. */
function linkRun(cell, run) {
  if (!run) return;
  const link = createNode('a', 'run-link', cell.textContent);
  link.href = '#';
  link.addEventListener('click', event => { event.preventDefault(); openRun(run); });
  cell.replaceChildren(link);
}

/** Opens the Fine-tune tab and selects a run there, as soon as its list is drawn. */
function openRun(run, attempts = 50) {
  const tab = [...document.querySelectorAll('[role=tab]')].find(node => node.textContent.trim() === 'Fine-tune');
  if (tab && tab.getAttribute('aria-selected') !== 'true') tab.click();
  const row = [...document.querySelectorAll('.history-row')].find(node => node.dataset.run === run);
  if (row) row.click(); else if (attempts) setTimeout(openRun, 100, run, attempts - 1);
}

/** Draws metrics, notes, the comparison of branches and all charts. */
function drawContent(data) {
  byClass('dash-metrics').replaceChildren(...data.metrics.map(metric => {
    const node = fromTemplate('metric-template');
    setText(node.querySelector('dt'), metric.name);
    setText(byClass('metric-value', node), metric.value);
    const change = byClass('metric-change', node);
    const missing = data.has_previous ? 'no data in the previous period' : '';
    setText(change, metric.change ? metric.change + ' (was ' + metric.previous + ')' : metric.previous ? 'was ' + metric.previous : missing);
    change.dataset.trend = metric.trend;
    return node;
  }));
  byClass('dash-notes').replaceChildren(...data.notes.map(note => createNode('li', '', note)));
  byClass('dash-branches').hidden = !data.branches.length;
  drawBranches(data);
  const times = [...data.bins, data.end];
  data.charts.forEach(chart => drawTimeChart(chart, times, data));
  drawScatter(data.scatter);
  drawBars('Cost per model', 'US dollars', data.cost_per_model, 'No call in this period has a known price.');
  drawBars('Errors by class', 'calls', data.errors, 'No call failed in this period.');
}

/** Draws the table of branches, with the change of each value to the first branch. */
function drawBranches(data) {
  const table = byClass('dash-branches').querySelector('table');
  setText(byClass('branches-verdict'), data.verdict);
  fillTable(table, ['Branch', ...data.columns], data.branches.map(branch => [branch.name, ...branch.cells.map(cell => cell.value)]));
  data.branches.forEach((branch, row) => branch.cells.forEach((cell, column) => {
    const change = createNode('span', 'metric-change', cell.change);
    change.dataset.trend = cell.trend;
    if (cell.change) table.tBodies[0].rows[row].cells[column + 1].append(' ', change);
  }));
}

// ── Charts ──────────────────────────────────────────────────────────────────────────────────────────────────────────

const CURSOR = {sync: {key: 'usage'}, points: {size: 7}, drag: {x: true, y: false, uni: 12}};
const WHOLE_NUMBERS = [1, 10, 100, 1e3, 1e4, 1e5, 1e6, 1e7].flatMap(power => [power, 2 * power, 5 * power]);
const DAY = 86400, HOUR = 3600, MINUTE = 60;
// For each distance of the ticks in seconds: a label, and what follows it where the year or the day changes.
const TIME_LABELS = [
  [365 * DAY, '{YYYY}', null, null, null, null, null, null, 1],
  [28 * DAY, '{MMM}', '\n{YYYY}', null, null, null, null, null, 1],
  [DAY, '{D} {MMM}', '\n{YYYY}', null, null, null, null, null, 1],
  [MINUTE, '{HH}:{mm}', '\n{D} {MMM}', null, '\n{D} {MMM}', null, null, null, 1],
];
const compact = new Intl.NumberFormat('en', {notation: 'compact', maximumSignificantDigits: 4});
/** Formats a number on an axis in a unit of the data. */
const formatTick = {
  'calls': value => compact.format(value),
  'reward': value => value.toFixed(2),
  'US dollars': value => '$' + value.toLocaleString('en', {maximumSignificantDigits: 4}),
  's': (value, all) => all[all.length - 1] < 1 ? +(1000 * value).toPrecision(4) + ' ms' : +value.toPrecision(4) + ' s',
};

/** Returns the size of a y axis, in pixels, that its longest number needs. */
function axisSize(plot, numbers, index, cycle) {
  const axis = plot.axes[index];
  if (cycle > 1) return axis._size;
  plot.ctx.font = axis.font[0];
  const widths = (numbers || []).map(number => plot.ctx.measureText(number).width / devicePixelRatio);
  return Math.ceil(axis.ticks.size + axis.gap + 6 + Math.max(20, ...widths));
}

/** Returns the options of an axis of numbers in a unit. */
const numberAxis = (unit, label, options) => ({label, values: (_, numbers) => numbers.map(number => formatTick[unit](number, numbers)), incrs: unit === 'calls' ? WHOLE_NUMBERS : undefined, ...options});
/** Returns the limits of an axis from zero to a little more than the highest value. */
const fromZero = (low, high) => [0, high > 0 ? 1.06 * high : 1];

/** Returns the section of a title, which is created at first. `create` completes it. */
function sectionOf(title, subtitle, template, create) {
  let chart = charts.get(title);
  if (!chart) {
    const section = fromTemplate(template);
    setText(byClass('chart-title', section), title);
    byClass('table-scroll', section).setAttribute('aria-label', template === 'bars-template' ? title : title + ' as a table');
    byClass('dash-charts').append(section);
    chart = {section, hidden: new Set()};
    charts.set(title, chart);
    create(chart);
  }
  setText(byClass('chart-subtitle', chart.section), subtitle);
  return chart;
}

/** Completes a section: its plot, whose lines the legend shows and hides, and its table, filled while it is open. */
function addPlot(chart, options) {
  const container = byClass('chart-plot', chart.section), details = chart.section.querySelector('details');
  chart.plot = new LinePlot(container, {height: 220, range: fromZero, onSelect: () => {}, onReset: zoomOut, ...options});
  details.addEventListener('toggle', () => chart.fill());
  new ResizeObserver(() => chart.redraw()).observe(container);
  byClass('chart-legend', chart.section).addEventListener('click', event => {
    const button = event.target.closest('button');
    if (!button) return;
    const index = [...button.closest('ul').children].indexOf(button.parentNode), visible = chart.hidden.delete(button.dataset.name);
    if (!visible) chart.hidden.add(button.dataset.name);
    button.setAttribute('aria-pressed', visible);
    chart.plot.setVisible(index, visible);
  });
}

/** Draws the names of a chart's lines as buttons; nodes stay as long as the names do. */
function drawLegend(chart, names) {
  const list = byClass('chart-legend', chart.section);
  if (list.dataset.names === JSON.stringify(names)) return;
  list.dataset.names = JSON.stringify(names);
  list.replaceChildren(...names.map((name, index) => {
    const item = createNode('li', colourClass(index)), button = createNode('button');
    button.type = 'button';
    button.dataset.name = name;
    button.setAttribute('aria-pressed', !chart.hidden.has(name));
    button.append(createNode('i'), createNode('bdi', '', name), createNode('span', 'legend-value'));
    item.append(button);
    return item;
  }));
}

/** Writes a text beside each name of a legend. */
function writeLegend(chart, texts) {
  chart.section.querySelectorAll('.legend-value').forEach((node, index) => setText(node, texts[index] ?? ''));
}

/** Returns uPlot's options of the line at an index: its colour, and whether it is shown. */
function lineStyle(chart, name, index) {
  const item = byClass('chart-legend', chart.section).children[index];
  return {name, show: !chart.hidden.has(name), stroke: () => getComputedStyle(item).getPropertyValue('--tone').trim()};
}

/** Draws values over time: lines that end at gaps, with the values of all lines at the pointer's time. */
function drawTimeChart(data, times, {zone, bin_texts}) {
  const chart = sectionOf(data.title, data.subtitle, 'chart-template', created => addPlot(created, {
    cursor: CURSOR, scale: {time: true}, settings: {tzDate: seconds => uPlot.tzDate(new Date(1000 * seconds), created.zone)},
    axes: [{values: TIME_LABELS, size: 42}, numberAxis(data.unit, data.label, {size: axisSize})],
    onCursor: index => created.write(index), onSelect: (first, last) => zoomInto(first, last, created.times),
  }));
  const last = data.lines.length ? times.length - 2 : -1;
  chart.write = index => {
    const shown = Math.min(index ?? last, last);
    setText(byClass('chart-at', chart.section), shown < 0 ? 'No data in this period' : bin_texts[shown] + (index === null ? ', latest' : ''));
    writeLegend(chart, data.lines.map(line => line.texts[shown]));
  };
  chart.fill = () => {
    if (!chart.section.querySelector('details').open) return;
    fillTable(chart.section.querySelector('table'), ['From, ' + zone, ...data.lines.map(line => line.name)],
      bin_texts.map((bin, index) => [bin, ...data.lines.map(line => line.texts[index])]));
  };
  chart.redraw = () => {
    const lines = data.lines.map((line, index) => ({...lineStyle(chart, line.name, index), values: line.values, width: 2, points: {show: false, size: 6}}));
    if (chart.plot.draw(times.slice(0, -1), lines, zone)) chart.plot.setRange(times[0], times.length > 2 ? times[times.length - 2] : times[1]);
  };
  Object.assign(chart, {times, zone});
  drawLegend(chart, data.lines.map(line => line.name));
  byClass('chart-plot', chart.section).setAttribute('aria-label', data.title + ' ' + data.subtitle + ', maximum ' + (data.max_text || 'unknown') + '. The table lists all values.');
  chart.redraw();
  chart.write(chart.plot.index);
  chart.fill();
}

/** Draws mean reward against median latency, one dot per model. */
function drawScatter(points) {
  const chart = sectionOf('Reward and latency', 'one dot per model, sized by its number of calls', 'chart-template', created => addPlot(created, {
    cursor: {points: {show: false}, drag: {x: false, y: false}}, scale: {time: false, range: (_, low, high) => fromZero(low, high)}, range: () => [0, 1],
    axes: [numberAxis('s', 'median latency', {size: 32}), numberAxis('reward', 'mean reward', {size: axisSize})],
    onCursor: index => created.write(index),
  }));
  const scored = points.filter(point => point.y !== null).sort((a, b) => a.x - b.x), maxCalls = Math.max(1, ...scored.map(point => point.calls));
  const describe = ({name, cells: [calls, latency, reward, cost]}) => name + ': reward ' + reward + ', median latency ' + latency + ', ' + cost + ' per request, ' + calls + ' calls';
  chart.write = index => setText(byClass('chart-at', chart.section), index === null || !scored[index] ? (scored.length ? scored.length + ' scored models' : 'No call in this period has a reward.') : describe(scored[index]));
  chart.fill = () => {
    if (!chart.section.querySelector('details').open) return;
    fillTable(chart.section.querySelector('table'), ['Model', 'Calls', 'Median latency', 'Mean reward', 'Cost per request'], points.map(point => [point.name, ...point.cells]));
  };
  chart.redraw = () => {
    const dots = scored.map((point, index) => {
      const style = lineStyle(chart, point.name, index);
      return {...style, values: scored.map(other => other === point ? point.y : null), paths: () => null, alpha: 0.75, points: {show: true, fill: style.stroke, size: 8 + 14 * Math.sqrt(point.calls / maxCalls), filter: null}};
    });
    if (chart.plot.draw(scored.map(point => point.x), dots, JSON.stringify(scored.map(point => point.calls / maxCalls)))) chart.plot.setRange(...fromZero(0, Math.max(0, ...scored.map(point => point.x))));
  };
  drawLegend(chart, scored.map(point => point.name));
  byClass('chart-plot', chart.section).setAttribute('aria-label', 'Reward against latency of ' + scored.length + ' models. The table lists all values.');
  chart.redraw();
  chart.write(chart.plot.index);
  writeLegend(chart, scored.map(point => point.cells[2]));
  chart.fill();
}

/** Draws a bar chart as a table with a bar in each row. */
function drawBars(title, subtitle, bars, emptyText) {
  const {section} = sectionOf(title, subtitle, 'bars-template', () => {});
  setText(byClass('bars-empty', section), emptyText);
  byClass('bars-empty', section).hidden = bars.length > 0;
  section.querySelector('tbody').replaceChildren(...bars.map(bar => {
    const row = createRow([bar.name, bar.text]), mark = createNode('i');
    linkRun(row.firstElementChild, bar.run);
    mark.style.width = (100 * bar.fraction).toFixed(1) + '%';
    mark.hidden = !bar.fraction;
    row.lastElementChild.prepend(mark);
    return row;
  }));
}

// ── Period ──────────────────────────────────────────────────────────────────────────────────────────────────────────

/** Selects the bins that a dragged span touches as the tab's period. */
function zoomInto(first, last, times) {
  if (zooming) return;  // the other charts, whose cursors follow this one, report the same span
  zooming = true;
  const start = Math.max(0, times.findLastIndex(time => time <= first)), end = times.findIndex(time => time >= last);
  zooms.push(props.value.filter);
  trigger('zoom', {start: times[start], end: times[end < 0 ? times.length - 1 : Math.max(end, start + 1)]});
}

/** Selects the period before the latest zoom. */
function zoomOut() {
  if (zooms.length && !zooming) trigger('zoom', zooms.pop());
}

byClass('zoom-out').addEventListener('click', zoomOut);

// ── Budgets and input ───────────────────────────────────────────────────────────────────────────────────────────────

/** Draws the budgets, if they have changed. */
function drawBudgets(budgets) {
  const list = byClass('dash-budget-list'), json = JSON.stringify(budgets);
  if (json === drawnBudgets) return;
  drawnBudgets = json;
  if (list.contains(document.activeElement)) budgetForm.branch.focus();
  byClass('dash-no-budget').hidden = budgets.length > 0;
  list.replaceChildren(...budgets.map(budget => {
    const item = createNode('li', 'dash-budget'), bar = createNode('div', 'budget-bar'), mark = createNode('i');
    item.dataset.state = budget.state;
    mark.style.width = (100 * budget.fraction).toFixed(1) + '%';
    bar.append(mark);
    const state = {ok: '', warning: ' · almost spent', spent: budget.stop ? ' · spent: paid calls are stopped' : ' · spent'}[budget.state];
    const remove = createNode('button', '', 'Remove');
    remove.type = 'button';
    remove.setAttribute('aria-label', 'Remove the budget of ' + budget.name);
    remove.addEventListener('click', () => trigger('budget', {action: 'remove', branch: budget.branch}));
    const text = createNode('p');
    text.append(createNode('bdi', 'budget-name', budget.name), ' ' + budget.text + state + (budget.stop && budget.state !== 'spent' ? ' · stops at 100 %' : ''));
    item.append(text, bar, remove);
    return item;
  }));
}

/** Draws the limits, if they have changed. */
function drawAlerts(data) {
  const list = byClass('alert-list'), json = JSON.stringify(data);
  if (json === drawnAlerts) return;
  drawnAlerts = json;
  setText(byClass('alerts-text'), data.text);
  list.replaceChildren(...data.alerts.map(alert => {
    const item = createNode('li', 'dash-budget'), text = createNode('p'), remove = createNode('button', '', 'Remove');
    item.dataset.state = alert.exceeded ? 'spent' : 'ok';
    remove.type = 'button';
    remove.setAttribute('aria-label', 'Remove the alert of ' + alert.name);
    remove.addEventListener('click', () => trigger('alert', {action: 'remove', branch: alert.branch, measure: alert.measure}));
    text.append(createNode('bdi', 'budget-name', alert.name), ' ' + alert.text);
    item.append(text, remove);
    return item;
  }));
}

alertForm.addEventListener('submit', event => {
  event.preventDefault();
  trigger('alert', {action: 'set', branch: alertForm.branch.value, measure: alertForm.measure.value, limit: alertForm.limit.value});
  alertForm.reset();
});

/** Draws what this machine costs, and the suggestions. */
function drawMachine(machine) {
  byClass('dash-machine').hidden = !machine;
  if (!machine) return;
  setText(byClass('machine-text'), machine.text);
  byClass('machine-remove').hidden = !machine.is_set;
  const suggestions = byClass('machine-suggestions');
  if (suggestions.childElementCount === machine.suggestions.length) return;
  suggestions.replaceChildren(...machine.suggestions.map(suggestion => {
    const button = createNode('button', '', suggestion.text);
    button.type = 'button';
    button.addEventListener('click', () => { machineForm.dollars.value = suggestion.dollars; machineForm.dollars.focus(); });
    return button;
  }));
}

machineForm.addEventListener('submit', event => {
  event.preventDefault();
  trigger('machine', {action: 'set', dollars: machineForm.dollars.value, past: machineForm.past.checked});
  machineForm.reset();
});
byClass('machine-remove').addEventListener('click', () => trigger('machine', {action: 'remove'}));
budgetForm.addEventListener('submit', event => {
  event.preventDefault();
  trigger('budget', {action: 'set', branch: budgetForm.branch.value, limit: budgetForm.limit.value, stop: budgetForm.stop.checked});
  budgetForm.reset();
});
generateButton.addEventListener('click', () => {
  generateButton.disabled = true;
  setText(byClass('dash-generate-status'), 'Generating sample traffic …');
  trigger('generate', {});
});
watch('value', draw);
draw();
