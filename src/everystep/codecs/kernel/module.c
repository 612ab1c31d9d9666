/* The module everystep.codecs._kernel: buffers in, numbers out, the interpreter's lock released. */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "packed.h"

/* Flat buffers of one call; `count` of them are held. */
typedef struct {
    Py_buffer view[12];
    int count;
} Held;

static void release(Held *held) {
    while (held->count) PyBuffer_Release(&held->view[--held->count]);
}

static Py_buffer *hold(Held *held, PyObject *object, int flags) {
    Py_buffer *view = &held->view[held->count];
    if (PyObject_GetBuffer(object, view, flags) < 0) return NULL;
    held->count++;
    return view;
}

static PyObject *refuse(Held *held, const char *text) {
    release(held);
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, text);
    return NULL;
}

static PyObject *answer(Held *held, long long size) {
    release(held);
    if (size == FAILED_MEMORY) return PyErr_NoMemory();
    if (size == NO_GAIN) Py_RETURN_NONE;
    return PyLong_FromLongLong(size);
}

static PyObject *told(Held *held, const char *wrong) {
    release(held);
    if (wrong && wrong[0] == 'm' && wrong[1] == 'e') return PyErr_NoMemory();
    if (wrong) return PyUnicode_FromString(wrong);
    Py_RETURN_NONE;
}

static int fits(Form form, const Py_buffer *data, const Py_buffer *base) {
    return form_is_known(form) && data->len == base->len && data->len % form.width == 0;
}

/* plan(data, base, width, ordered, shift) -> (header, bytes packed, bytes alone, share changed) */
static PyObject *call_plan(PyObject *self, PyObject *args) {
    PyObject *data_object, *base_object;
    Form form;
    Held held = {.count = 0};
    Estimate estimate = {0, 0, 0};
    uint8_t header[HEADER_MAX];
    (void)self;
    if (!PyArg_ParseTuple(args, "OOiii", &data_object, &base_object, &form.width, &form.ordered, &form.shift))
        return NULL;
    Py_buffer *data = hold(&held, data_object, PyBUF_SIMPLE), *base = data ? hold(&held, base_object, PyBUF_SIMPLE) : NULL;
    if (!base || !fits(form, data, base)) return refuse(&held, "data and base do not fit each other, or the form");
    long size;
    Py_BEGIN_ALLOW_THREADS
    size = plan(data->buf, base->buf, (size_t)data->len / (size_t)form.width, form, header, &estimate);
    Py_END_ALLOW_THREADS
    if (size < 0) return answer(&held, size);
    release(&held);
    return Py_BuildValue("(y#ddd)", (char *)header, (Py_ssize_t)size, estimate.packed, estimate.alone, estimate.changed);
}

/* pack(header, data, base, out) -> bytes stored, or None where they are too many for `out` */
static PyObject *call_pack(PyObject *self, PyObject *args) {
    PyObject *header_object, *data_object, *base_object, *out_object;
    Held held = {.count = 0};
    (void)self;
    if (!PyArg_ParseTuple(args, "OOOO", &header_object, &data_object, &base_object, &out_object)) return NULL;
    Py_buffer *header = hold(&held, header_object, PyBUF_SIMPLE);
    Py_buffer *data = header ? hold(&held, data_object, PyBUF_SIMPLE) : NULL;
    Py_buffer *base = data ? hold(&held, base_object, PyBUF_SIMPLE) : NULL;
    Py_buffer *out = base ? hold(&held, out_object, PyBUF_WRITABLE) : NULL;
    if (!out || header->len < 5 || !((uint8_t *)header->buf)[0] || data->len != base->len ||
        data->len % ((uint8_t *)header->buf)[0])
        return refuse(&held, "data and base do not fit each other, or the header");
    long long size;
    Py_BEGIN_ALLOW_THREADS
    size = pack(header->buf, (size_t)header->len, data->buf, base->buf,
                (size_t)data->len / ((uint8_t *)header->buf)[0], out->buf, (size_t)out->len);
    Py_END_ALLOW_THREADS
    return answer(&held, size);
}

/* pack_sparse(data, base, width, ordered, shift, most, out) -> bytes stored, or None: more than `most` words differ */
static PyObject *call_pack_sparse(PyObject *self, PyObject *args) {
    PyObject *data_object, *base_object, *out_object;
    Py_ssize_t most;
    Form form;
    Held held = {.count = 0};
    (void)self;
    if (!PyArg_ParseTuple(args, "OOiiinO", &data_object, &base_object, &form.width, &form.ordered, &form.shift, &most,
                          &out_object))
        return NULL;
    Py_buffer *data = hold(&held, data_object, PyBUF_SIMPLE), *base = data ? hold(&held, base_object, PyBUF_SIMPLE) : NULL;
    Py_buffer *out = base ? hold(&held, out_object, PyBUF_WRITABLE) : NULL;
    if (!out || !fits(form, data, base) || most < 0 || most > data->len || (data->len / form.width) >> 32)
        return refuse(&held, "data and base do not fit each other, or the form");
    long long size;
    Py_BEGIN_ALLOW_THREADS
    size = pack_sparse(data->buf, base->buf, (size_t)data->len / (size_t)form.width, form, (size_t)most, out->buf,
                       (size_t)out->len);
    Py_END_ALLOW_THREADS
    return answer(&held, size);
}

static PyObject *unpacked(PyObject *args, const char *(*back)(const uint8_t *, size_t, const uint8_t *, uint8_t *, size_t)) {
    PyObject *stored_object, *base_object, *out_object;
    Held held = {.count = 0};
    if (!PyArg_ParseTuple(args, "OOO", &stored_object, &base_object, &out_object)) return NULL;
    Py_buffer *stored = hold(&held, stored_object, PyBUF_SIMPLE);
    Py_buffer *base = stored ? hold(&held, base_object, PyBUF_SIMPLE) : NULL;
    Py_buffer *out = base ? hold(&held, out_object, PyBUF_WRITABLE) : NULL;
    if (!out || base->len != out->len) return refuse(&held, "the base is not as long as the result");
    const char *wrong;
    Py_BEGIN_ALLOW_THREADS
    wrong = back(stored->buf, (size_t)stored->len, base->buf, out->buf, (size_t)out->len);
    Py_END_ALLOW_THREADS
    return told(&held, wrong);
}

/* unpack(stored, base, out) -> None, or what is wrong; `out` may be `base` */
static PyObject *call_unpack(PyObject *self, PyObject *args) {
    (void)self;
    return unpacked(args, unpack);
}

static PyObject *call_unpack_sparse(PyObject *self, PyObject *args) {
    (void)self;
    return unpacked(args, unpack_sparse);
}

/* split(data, width, turn, rows): `rows` is as long as `data` */
static PyObject *call_split(PyObject *self, PyObject *args) {
    PyObject *data_object, *rows_object;
    Form form = {.ordered = 0, .shift = UNGROUPED};
    int turn;
    Held held = {.count = 0};
    (void)self;
    if (!PyArg_ParseTuple(args, "OipO", &data_object, &form.width, &turn, &rows_object)) return NULL;
    Py_buffer *data = hold(&held, data_object, PyBUF_SIMPLE), *rows = data ? hold(&held, rows_object, PyBUF_WRITABLE) : NULL;
    if (!rows || !fits(form, data, rows)) return refuse(&held, "the rows are not as long as the data");
    Py_BEGIN_ALLOW_THREADS
    split(data->buf, (size_t)data->len / (size_t)form.width, form.width, turn, rows->buf);
    Py_END_ALLOW_THREADS
    return answer(&held, data->len);
}

/* join(rows, turn, out): a tuple of 1, 2, 4 or 8 rows of equal length */
static PyObject *call_join(PyObject *self, PyObject *args) {
    PyObject *rows_object, *out_object;
    Form form = {.ordered = 0, .shift = UNGROUPED};
    const uint8_t *rows[8];
    int turn;
    Held held = {.count = 0};
    (void)self;
    if (!PyArg_ParseTuple(args, "O!pO", &PyTuple_Type, &rows_object, &turn, &out_object)) return NULL;
    form.width = (int)PyTuple_Size(rows_object);
    Py_buffer *out = hold(&held, out_object, PyBUF_WRITABLE);
    if (!out || !form_is_known(form) || out->len % form.width) return refuse(&held, "no such number of rows");
    for (int i = 0; i < form.width; i++) {
        Py_buffer *row = hold(&held, PyTuple_GetItem(rows_object, i), PyBUF_SIMPLE);
        if (!row || row->len != out->len / form.width) return refuse(&held, "rows of another length");
        rows[i] = row->buf;
    }
    Py_BEGIN_ALLOW_THREADS
    join(rows, (size_t)out->len / (size_t)form.width, form.width, turn, out->buf);
    Py_END_ALLOW_THREADS
    return answer(&held, out->len);
}

static PyMethodDef methods[] = {
    {"plan", call_plan, METH_VARARGS, NULL},
    {"pack", call_pack, METH_VARARGS, NULL},
    {"unpack", call_unpack, METH_VARARGS, NULL},
    {"pack_sparse", call_pack_sparse, METH_VARARGS, NULL},
    {"unpack_sparse", call_unpack_sparse, METH_VARARGS, NULL},
    {"split", call_split, METH_VARARGS, NULL},
    {"join", call_join, METH_VARARGS, NULL},
    {NULL, NULL, 0, NULL},
};

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_kernel", NULL, -1, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__kernel(void) { return PyModule_Create(&definition); }
