// A field for a local time, such as 2026-11-23T18:00:00. Runs once, when the component loads.

const input = element.querySelector('input');
element.querySelector('span').textContent = props.label;

/** Shows the value, unless it is being entered. */
function draw() {
  if (document.activeElement !== input) input.value = props.value || '';
}

input.addEventListener('change', () => {
  if (input.value && input.value < '1990') return;  // the year is being typed
  props.value = input.value;
  trigger('input');
});
watch('value', draw);
draw();
