// The images of the message that is being written: chosen or pasted, scaled down in the browser, and sent with the message as
// data URLs, the component's value. gr.HTML provides element, props and watch.
const attach = element.querySelector('.mh-attach');
const list = element.querySelector('.mh-attached');
const note = element.querySelector('.mh-attach-note');
const input = element.querySelector('input');
const COUNT = Number(attach.dataset.count), CHARACTERS = Number(attach.dataset.characters);
const LONGEST = 1024;     // pixels of the longer side
const AS_IT_IS = 200_000; // bytes of a small file, which is not encoded again
const current = () => props.value || [];

function draw() {
  list.replaceChildren(...current().map((url, index) => {
    const item = document.createElement('li'), image = new Image(), remove = document.createElement('button');
    image.src = url;
    image.alt = `Image ${index + 1} of the message`;
    remove.type = 'button';
    remove.className = 'mh-remove-image';
    remove.textContent = '×';
    remove.title = 'Remove this image';
    remove.setAttribute('aria-label', `Remove image ${index + 1}`);
    remove.dataset.index = index;
    item.append(image, remove);
    return item;
  }));
}

function set(images, text) {
  props.value = images;
  note.textContent = text;
  draw();
}

function dataUrl(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = reject;
    reader.readAsDataURL(file);
  });
}

async function scaled(file) {
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  if (scale === 1 && file.size <= AS_IT_IS && input.accept.split(',').includes(file.type)) return dataUrl(file);
  const canvas = document.createElement('canvas'), context = canvas.getContext('2d');
  canvas.width = Math.max(1, Math.round(bitmap.width * scale));
  canvas.height = Math.max(1, Math.round(bitmap.height * scale));
  context.fillStyle = 'white';
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  for (const quality of [0.9, 0.7, 0.4]) {
    const url = canvas.toDataURL('image/jpeg', quality);
    if (url.length <= CHARACTERS) return url;
  }
  throw new Error('too large');
}

async function add(files) {
  for (const file of files) {
    if (current().length >= COUNT) { note.textContent = `A message has at most ${COUNT} images.`; return; }
    try {
      const url = await scaled(file);
      set([...current(), url], `Image ${current().length + 1} added`);
    } catch (error) {
      note.textContent = `${file.name || 'This file'} is not an image that can be read.`;
    }
  }
}

element.addEventListener('click', (event) => {
  const button = event.target.closest('button');
  if (!button) return;
  if (button.classList.contains('mh-add-image')) { input.click(); return; }
  const index = Number(button.dataset.index);
  set(current().filter((_, other) => other !== index), `Image ${index + 1} removed`);
  element.querySelector('.mh-add-image').focus();
});
input.addEventListener('change', () => { add([...input.files]); input.value = ''; });
document.addEventListener('paste', (event) => {
  const files = [...(event.clipboardData?.files || [])].filter((file) => file.type.startsWith('image/'));
  if (!files.length || !event.target.closest?.('#mh-message')) return;
  event.preventDefault();
  add(files);
});
watch('value', () => { if (!current().length) note.textContent = ''; draw(); });
draw();
