// Draws the list of evaluations from props.value. Text is inserted with textContent only.

const list = element.querySelector('ul');

/** Draws the list and keeps the keyboard focus. */
function draw() {
  const value = props.value || {list: [], selected: ''};
  const focused = list.contains(document.activeElement) ? document.activeElement.dataset.id : null;
  element.querySelector('.eval-list').hidden = !value.list.length;
  list.replaceChildren(...value.list.map(row => {
    const item = document.createElement('li'), button = createNode('button', 'eval-row');
    button.type = 'button';
    button.dataset.id = row.id;
    button.dataset.state = row.state;
    button.setAttribute('aria-pressed', String(row.id === value.selected));
    button.append(createNode('b', '', row.name), createNode('span', 'eval-badge', row.badge), createNode('small', '', row.summary));
    item.append(button);
    return item;
  }));
  if (focused) [...list.querySelectorAll('button')].find(button => button.dataset.id === focused)?.focus();
}

element.addEventListener('click', event => {
  const button = event.target.closest('.eval-row');
  if (button) trigger('pick', {evaluation: button.dataset.id});
});
watch('value', draw);
draw();
