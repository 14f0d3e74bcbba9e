// Draws the dashboard from props.value. Runs once, when the component loads. Text is inserted with textContent only.

const SVG = 'http://www.w3.org/2000/svg';
const COLOURS = 8;  // CSS classes colour-0 to colour-7
const byClass = (name, parent = element) => parent.querySelector('.' + name);
const fromTemplate = name => byClass(name).content.firstElementChild.cloneNode(true);
const generateButton = byClass('dash-generate'), budgetForm = byClass('dash-budget-form'), machineForm = byClass('machine-form'), alertForm = byClass('alert-form');
const openTables = new Set();  // titles of the charts whose tables are open
let drawnBudgets = '', drawnAlerts = '';  // JSON of the budgets and alerts that are drawn

/** Sets an element's text if it differs, so that screen readers announce only changes. */
const setText = (node, text) => { if (node.textContent !== text) node.textContent = text; };
/** Returns the CSS class of the colour of the line at an index. */
const colourClass = index => 'colour-' + index % COLOURS;

/** Creates an HTML element with a class and a text. */
function createNode(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

/** Creates an SVG element. */
function createShape(tag, attributes) {
  const shape = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) shape.setAttribute(name, value);
  return shape;
}

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
  setText(byClass('dash-period'), data.period);
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
    setText(change, metric.change ? metric.change + ' (was ' + metric.previous + ')' : 'no data in the previous period');
    change.dataset.trend = metric.trend;
    return node;
  }));
  byClass('dash-notes').replaceChildren(...data.notes.map(note => createNode('li', '', note)));
  byClass('dash-branches').hidden = !data.branches.length;
  drawBranches(data);
  const focused = document.activeElement && document.activeElement.closest('.dash-chart');
  if (focused && element.contains(focused) && focused.querySelector('details[open]')) return;  // a table is being read
  byClass('dash-charts').replaceChildren(
    ...data.charts.map(createChart),
    createScatter(data.scatter),
    createBars('Cost per model', 'US dollars', data.cost_per_model, 'No call in this period has a known price.'),
    createBars('Errors by class', 'calls', data.errors, 'No call failed in this period.'));
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

/** Creates an empty chart whose table stays open across refreshes. */
function createFrame(title, subtitle) {
  const chart = fromTemplate('chart-template');
  setText(byClass('chart-title', chart), title);
  setText(byClass('chart-subtitle', chart), subtitle);
  byClass('table-scroll', chart).setAttribute('aria-label', title + ' as a table');
  const details = chart.querySelector('details');
  details.open = openTables.has(title);
  details.addEventListener('toggle', () => { if (details.open) openTables.add(title); else openTables.delete(title); });
  return chart;
}

/** Creates a line chart over time. */
function createChart(data) {
  const chart = createFrame(data.title, data.subtitle), svg = chart.querySelector('svg');
  const count = data.bins.length, max = data.max || 1;
  const x = index => count < 2 ? 300 : index / (count - 1) * 600;
  const y = value => 196 - value / max * 184;
  const grid = [0, 0.5, 1].map(fraction => createShape('line', {class: 'grid', x1: 0, x2: 600, y1: y(fraction * max), y2: y(fraction * max)}));
  const lines = data.lines.flatMap((line, index) => segments(line.values).map(segment => segment.length > 1
    ? createShape('polyline', {class: 'line ' + colourClass(index), points: segment.map(bin => x(bin).toFixed(1) + ',' + y(line.values[bin]).toFixed(1)).join(' ')})
    : createShape('line', {class: 'line single ' + colourClass(index), x1: x(segment[0]) - 0.01, x2: x(segment[0]) + 0.01, y1: y(line.values[segment[0]]), y2: y(line.values[segment[0]])})));
  svg.replaceChildren(...grid, ...lines);
  svg.setAttribute('aria-label', data.title + ' ' + data.subtitle + ', maximum ' + (data.max_text || 'unknown') + '. The table lists all values.');
  setText(byClass('chart-max', chart), data.max_text || 'No data in this period');
  setText(byClass('chart-first', chart), data.bins[0] || '');
  setText(byClass('chart-last', chart), (data.bins[count - 1] || '') + ' ' + data.zone);
  drawLegend(chart, data.lines.map(line => line.name));
  fillTable(chart.querySelector('table'), ['From', ...data.lines.map(line => line.name)],
    data.bins.map((bin, index) => [bin, ...data.lines.map(line => line.texts[index])]));
  addTooltip(chart, count, index => [data.bins[index], ...data.lines.map(line => line.name + ': ' + line.texts[index])]);
  return chart;
}

/** Returns the indices of each run of consecutive known values. */
function segments(values) {
  const result = [];
  values.forEach((value, index) => {
    if (value === null) return;
    if (index && values[index - 1] !== null) result[result.length - 1].push(index); else result.push([index]);
  });
  return result;
}

/** Draws a chart's legend. */
function drawLegend(chart, names) {
  byClass('chart-legend', chart).replaceChildren(...names.map((name, index) => {
    const item = createNode('li', colourClass(index));
    item.append(createNode('i'), createNode('bdi', '', name));
    return item;
  }));
}

/** Shows the texts of the bin under the pointer. */
function addTooltip(chart, count, textsOf) {
  const frame = byClass('chart-frame', chart), tooltip = byClass('chart-tooltip', chart), cursor = byClass('chart-cursor', chart);
  frame.addEventListener('pointerleave', () => { tooltip.hidden = cursor.hidden = true; });
  frame.addEventListener('pointermove', event => {
    if (!count) return;
    const box = frame.getBoundingClientRect(), fraction = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    const index = count < 2 ? 0 : Math.round(fraction * (count - 1)), position = count < 2 ? 0.5 : index / (count - 1);
    tooltip.replaceChildren(...textsOf(index).map((text, row) => createNode(row ? 'span' : 'b', '', text)));
    tooltip.hidden = cursor.hidden = false;
    cursor.style.left = 100 * position + '%';
    tooltip.style.left = Math.min(Math.max(0, position * box.width + 10), Math.max(0, box.width - tooltip.offsetWidth)) + 'px';
  });
}

/** Creates a scatter plot of mean reward against median latency. */
function createScatter(points) {
  const chart = createFrame('Reward and latency', 'one dot per model, sized by its number of calls'), svg = chart.querySelector('svg');
  const scored = points.filter(point => point.y !== null);
  const maxLatency = Math.max(1e-9, ...scored.map(point => point.x)) * 1.1, maxCalls = Math.max(1, ...scored.map(point => point.calls));
  svg.setAttribute('preserveAspectRatio', 'xMidYMid meet');
  const grid = [0, 0.5, 1].map(fraction => createShape('line', {class: 'grid', x1: 0, x2: 600, y1: 190 - fraction * 180, y2: 190 - fraction * 180}));
  svg.replaceChildren(...grid, ...scored.map((point, index) => {
    const circle = createShape('circle', {class: 'dot ' + colourClass(index), cx: 8 + point.x / maxLatency * 580, cy: 190 - point.y * 180, r: 5 + 8 * Math.sqrt(point.calls / maxCalls)});
    const [calls, latency, reward, cost] = point.cells, title = document.createElementNS(SVG, 'title');
    title.textContent = point.name + ': reward ' + reward + ', median latency ' + latency + ', ' + cost + ' per request, ' + calls + ' calls';
    circle.append(title);
    return circle;
  }));
  svg.setAttribute('aria-label', 'Reward against latency of ' + scored.length + ' models. The table lists all values.');
  setText(byClass('chart-max', chart), scored.length ? 'reward 1' : 'No call in this period has a reward.');
  setText(byClass('chart-first', chart), 'faster');
  setText(byClass('chart-last', chart), 'slower (median latency)');
  drawLegend(chart, scored.map(point => point.name));
  fillTable(chart.querySelector('table'), ['Model', 'Calls', 'Median latency', 'Mean reward', 'Cost per request'], points.map(point => [point.name, ...point.cells]));
  return chart;
}

/** Creates a bar chart as a table with a bar in each row. */
function createBars(title, subtitle, bars, emptyText) {
  const chart = fromTemplate('bars-template');
  setText(byClass('chart-title', chart), title);
  setText(byClass('chart-subtitle', chart), subtitle);
  byClass('table-scroll', chart).setAttribute('aria-label', title);
  setText(byClass('bars-empty', chart), emptyText);
  byClass('bars-empty', chart).hidden = bars.length > 0;
  chart.querySelector('tbody').replaceChildren(...bars.map(bar => {
    const row = createRow([bar.name, bar.text]), mark = createNode('i');
    linkRun(row.firstElementChild, bar.run);
    mark.style.width = (100 * bar.fraction).toFixed(1) + '%';
    mark.hidden = !bar.fraction;
    row.lastElementChild.prepend(mark);
    return row;
  }));
  return chart;
}

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
